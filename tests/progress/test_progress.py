"""Time left, lines, bars, logs and the silence of libraries."""

from __future__ import annotations

import io
import logging
import sys
import warnings

import pytest

from lily.progress import display, libraries
from lily.progress.display import Bar, Events, Lines, read_events, standard
from lily.progress.estimate import Estimate, clock_time
from lily.progress.progress import Progress, counted, current


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def worked(estimate, clock, seconds, *key_and_units):
    clock.now += seconds
    estimate.advance(*key_and_units)


def test_the_time_left_is_the_rest_of_each_kind_at_its_measured_speed():
    clock = Clock()
    estimate = Estimate(clock)
    assert estimate.left() is None
    estimate.expect("lily", "training", "train", 30)
    estimate.expect("lily", "evaluation", "judge", 10)
    worked(estimate, clock, 2.0, "lily", "training", "train", 10)
    # a row judged is taken to cost a third of one trained on, until it is measured
    assert estimate.left() == pytest.approx(20 * 0.2 + 10 * 0.2 / 3)
    worked(estimate, clock, 5.0, "lily", "evaluation", "judge", 5)
    assert estimate.left() == pytest.approx(20 * 0.2 + 5 * 1.0)
    assert estimate.share() == pytest.approx(7 / (7 + 9))


def test_what_ends_early_is_not_waited_for_and_more_than_expected_is_no_negative_time():
    clock = Clock()
    estimate = Estimate(clock)
    estimate.expect("lily", "training", "train", 100)
    estimate.expect("lora", "training", "train", 10)
    worked(estimate, clock, 1.0, "lily", "training", "train", 10)
    estimate.end("lily")
    assert estimate.left() == pytest.approx(1.0)
    worked(estimate, clock, 2.0, "lora", "training", "train", 20)
    assert (estimate.left(), estimate.share()) == (0.0, 1.0)


def test_a_speed_of_long_ago_counts_less():
    clock = Clock()
    estimate = Estimate(clock)
    estimate.expect("lily", "training", "train", 1000)
    worked(estimate, clock, 10.0, "lily", "training", "train", 100)
    for _ in range(20):
        worked(estimate, clock, 60.0, "lily", "training", "train", 10)
    assert estimate.left() == pytest.approx(700 * 6.0, rel=0.01)


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (75.4, "01:15"), (3600, "1:00:00"), (36061, "10:01:01")])
def test_times_are_short(seconds, text):
    assert clock_time(seconds) == text


def speak(progress):
    progress.announce(["lily", "frozen encoder"])
    progress.expect("lily", "training", {"train": 2})
    progress.tell("header")
    with progress.stage("lily", "training"):
        progress.advance(1, "train")
        progress.evaluated("lily", "epoch 1/2", ["loss 0.5000", "accuracy 60.0"], best=True)
        progress.advance(1, "train")
        progress.evaluated("lily", "epoch 2/2", ["loss 0.6000", "accuracy 50.0"])


def test_lines_for_what_is_no_terminal_are_plain_and_aligned(capsys):
    with Progress(standard()) as progress:
        assert isinstance(progress.display, Lines)
        speak(progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "\x1b" not in shown.err
    assert "\r" not in shown.err
    first, one, two = shown.err.splitlines()
    assert first == "header"
    assert one.startswith("lily            epoch 1/2  loss 0.5000  accuracy 60.0  best  00:00 left")
    assert two == "lily            epoch 2/2  loss 0.6000  accuracy 50.0        00:00 left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_there_is_a_bar_which_is_gone_at_the_end(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with Progress(standard()) as progress:
        assert isinstance(progress.display, Bar)
        speak(progress)
        print("from elsewhere", file=sys.stderr)
        assert progress.display.bar.tasks[0].completed == 1.0
    written = terminal.getvalue()
    assert "lily: training" in written
    assert "accuracy 60.0" in written
    assert written.index("from elsewhere") < written.rindex("\x1b[2K")
    assert written.endswith("\x1b[1A\x1b[2K")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(standard(), Lines)
    assert type(standard(quiet=True)) is display.Silent


def test_quiet_hides_everything_but_warnings(capsys):
    with Progress(standard(quiet=True)) as progress:
        speak(progress)
        progress.warn("warning: one class")
    assert capsys.readouterr().err == "warning: one class\n"


def test_hours_without_an_evaluation_have_lines_too(capsys, monkeypatch):
    monkeypatch.setattr(display, "SELDOM", -1.0)
    lines = Lines()
    for percent in range(0, 100, 5):
        lines.update("lily: training", percent / 100, 60.0)
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == [
        f"{percent}%" for percent in range(10, 100, 10)
    ]


def test_another_process_reads_complete_events_once(tmp_path):
    file = tmp_path / "events"
    assert read_events(file, 0) == ([], 0)
    with Progress(Events(file)) as progress:
        speak(progress)
        (share, line, *_), position = read_events(file, 0)
        assert share == {"stage": "lily: training", "share": pytest.approx(0.5, abs=0.5)}
        assert line == {"what": "epoch 1/2", "values": ["loss 0.5000", "accuracy 60.0"], "best": True}
        with file.open("a") as half:
            half.write('{"what": "ep')
        assert read_events(file, position) == ([], position)


def test_the_log_has_what_was_said_before_it_was_opened_and_the_first_one_stays(tmp_path):
    with Progress() as progress:
        progress.keep("early")
        progress.log_to(tmp_path / "a.log")
        progress.log_to(tmp_path / "b.log")
        progress.tell("half a pair: \ud83d")
    lines = (tmp_path / "a.log").read_text("utf-8").splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["early", "half a pair: \\ud83d"]
    assert not (tmp_path / "b.log").exists()


def test_a_log_that_cannot_be_written_is_told_and_ends_nothing(tmp_path, capsys):
    with Progress() as progress:
        progress.log_to(tmp_path / "nowhere" / "a.log")
        progress.tell("more")
    assert "there will be no log" in capsys.readouterr().err


def test_batches_count_for_the_stage_of_the_active_progress():
    progress = Progress()
    with progress.active(), progress.stage("lily", "untrained"):
        assert current() is progress
        assert list(counted([[1, 2], [3]], "judge")) == [[1, 2], [3]]
    assert progress.estimate.done("lily", "untrained") == {"judge": 3.0}
    assert current() is not progress


NOISE = """
import logging, warnings
logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
warnings.warn("old function", UserWarning)
own = logging.getLogger("noisy")
own.addHandler(logging.StreamHandler())
own.propagate = False
"""


@pytest.fixture
def noisy(tmp_path, monkeypatch):
    """A library that speaks when it is imported, and brings a handler of its own."""
    (tmp_path / "noisy_library.py").write_text(NOISE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "noisy_library"
    sys.modules.pop("noisy_library", None)
    logging.getLogger("noisy").handlers.clear()


def heard(progress, noisy, tmp_path):
    progress.log_to(tmp_path / "run.log")
    with progress, libraries.kept(progress, [noisy]):
        logging.getLogger("noisy").warning("from its own handler")
        logging.getLogger("noisy").error("an error")
        namespace = {"__name__": "lily.plan.select", "warnings": warnings}
        exec("warnings.warn('of our own')", namespace)
    return (tmp_path / "run.log").read_text()


def test_libraries_are_silent_and_kept_while_our_warnings_and_all_errors_are_shown(noisy, tmp_path, capsys):
    before = logging.getLogger("noisy"), list(logging.root.handlers)
    log = heard(Progress(), noisy, tmp_path)
    assert capsys.readouterr().err.splitlines() == ["noisy: an error", "warning: of our own"]
    for said in ("Retrying in 1s [Retry 1/5].", "old function", "from its own handler", "an error", "of our own"):
        assert said in log
    assert logging.root.handlers == before[1]
    assert (before[0].propagate, len(before[0].handlers)) == (False, 1)


def test_verbose_lets_libraries_speak(noisy, tmp_path, capsys):
    with pytest.warns(UserWarning, match="of our own"):
        heard(Progress(verbose=True), noisy, tmp_path)
    __import__(noisy)
    logging.getLogger("noisy").warning("from its own handler")
    assert "from its own handler" in capsys.readouterr().err
