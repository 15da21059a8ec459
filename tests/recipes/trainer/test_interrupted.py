"""Runs that are killed, stopped or out of disk, and what becomes of them."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import peft.peft_model
import pytest
import torch
from helpers import tally
from recipes_helpers import classification, rows, sft, write_jsonl, write_recipe

from lily.cli import main as cli
from lily.errors import LilyError
from lily.io import atomic
from lily.recipes import loader, train
from lily.recipes.trainer import checkpoints, state_files
from lily.recipes.trainer.checkpoints import Moment
from lily.recipes.trainer.resumable import Resumable, due
from lily.recipes.trainer.signals import Signals

# Two passes over 36 rows in 5 steps each, the last of which is half a step; evaluations and checkpoints out of step.
SCHEDULE = {"epochs": 2, "batch_size": 4, "gradient_accumulation": 2, "learning_rate": 0.01, "precision": "float32"}
TOKEN = {"r": 4, "num_A": 1, "num_B": 2, "scaling": 4.0, "dropout": 0.1, "routing": "token"}
KINDS: dict[str, dict[str, Any]] = {
    "token": {"lily": TOKEN, "train": {**SCHEDULE, "evaluate_every": 3, "save_every": 2}, "baselines": ["lora"]},
    "settle": {
        "lily": {**TOKEN, "settle": {"start": 0.3, "end": 0.7}},
        "train": {**SCHEDULE, "evaluate_every": 2, "save_every": 1},
    },
    "lora": {"method": "lora", "train": {**SCHEDULE, "save_every": 3, "max_steps": 8, "early_stopping": 3}},
    "sft": {"train": {**SCHEDULE, "evaluate_every": 4, "save_every": "epoch"}},
}


def recipe_for(kind: str, model: Path, folder: Path, run: str) -> Any:
    table = [{**r, "question": f"question {r['text']}", "answer": ("no", "yes")[int(r["label"])]} for r in rows()]
    values = (sft if kind == "sft" else classification)(model, write_jsonl(folder / "t.jsonl", table), folder)
    return loader.load_recipe(write_recipe(folder, {**values, **KINDS[kind], "output": str(folder / run)}))


def forked(work: Callable[[], Any]) -> int:
    """The exit code of `work` in a process of its own, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            work()
        except SystemExit as end:
            code = int(end.code)
        except KeyboardInterrupt:
            code = 130
        except OSError as error:
            print(f"{error.filename}: {error.strerror}", file=sys.stderr)
            code = 2
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


WRITES = ("replace", "fsync", "mkdir", "unlink", "rmdir", "_exchange", "save_file", "safe_save_file")
COMPUTES = ("training_step", "prediction_step")


class Events:
    """Counts what a run does to the disk, and its steps, and calls `strike` before the n-th.

    A file of weights or states is half written at that moment.
    """

    def __init__(self, strike_at: int, strike: Callable[[], Any], of: Sequence[str] = (*WRITES, *COMPUTES)) -> None:
        self.count, self.strike_at, self.strike = 0, strike_at, strike
        for place in (os, atomic, Resumable, state_files, peft.peft_model):
            for name in of:
                if hasattr(place, name):
                    self.watch(place, name)

    def watch(self, place: Any, name: str) -> None:
        real = getattr(place, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.strike_at:
                if "save_file" in name:
                    real(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                self.strike()
            return real(*args, **kwargs)

        setattr(place, name, counted)


def sent(number: int, times: int = 1) -> Callable[[], None]:
    """A strike: this process is sent a signal."""

    def strike() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return strike


killed = sent(signal.SIGKILL)


def full() -> None:
    """A strike: the disk refuses."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def struck(recipe: Any, strike: Callable[[], Any], at: int, of: Sequence[str] = (*WRITES, *COMPUTES)) -> int:
    """Train in a process of its own with `strike` at one event; its exit code."""

    def work() -> None:
        Events(at, strike, of)
        train.train(recipe, quiet=True)

    return forked(work)


def goes_on(recipe: Any, output: Path) -> int:
    """Train on, in a process of its own that may read no pickle; its exit code."""

    def work() -> None:
        torch.load = None
        train.train(recipe, quiet=True, resume=(output / "recipe.yaml").is_file())

    return forked(work)


def left(run: Path) -> dict[str, Any]:
    """What a finished run left: weights, evaluations and figures, times and memory aside; every file's name."""
    found: dict[str, Any] = {"names": sorted(str(p.relative_to(run)) for p in run.rglob("*"))}
    for folder in (run, run / "lora"):
        if folder.is_dir():
            figures = json.loads((folder / "metrics.json").read_text())
            figures.pop("seconds"), figures.pop("peak_bytes")
            for values in figures["baselines"].values():
                values.pop("seconds")
            found[f"{folder.name} figures"] = figures
            found[f"{folder.name} progress"] = json.loads((folder / "progress.json").read_text())
            for name in ("best", "last"):
                found[f"{folder.name} {name}"] = (folder / name / "adapter_model.safetensors").read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory, encoder, chat_model):
    """Kind -> its recipes' folder and model, what an uninterrupted run leaves, and how many events it has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process cannot use those that its parent had started
    known: dict[str, Any] = {}

    def of(kind: str) -> tuple[Path, Path, dict[str, Any], int]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            model = chat_model if kind == "sft" else encoder
            recipe = recipe_for(kind, model, folder, "run")

            def work() -> None:
                events = Events(0, killed)
                train.train(recipe, quiet=True)
                (folder / "events").write_text(str(events.count))

            assert forked(work) == 0
            found = left(folder / "run")
            shutil.move(folder / "run", folder / "whole")
            known[kind] = folder, model, found, int((folder / "events").read_text())
        return known[kind]

    yield of
    torch.set_num_threads(threads)


def begun(whole: Any, kind: str) -> tuple[Any, Path]:
    """A kind's recipe and its folder, which is not there yet."""
    folder, model, _, _ = whole(kind)
    shutil.rmtree(folder / "run", ignore_errors=True)
    return recipe_for(kind, model, folder, "run"), folder / "run"


def ends_as_whole(whole: Any, kind: str, why: str = "") -> None:
    """Resume, and compare with the uninterrupted run."""
    folder, model, expected, _ = whole(kind)
    assert goes_on(recipe_for(kind, model, folder, "run"), folder / "run") == 0, why
    found = left(folder / "run")
    for name, value in expected.items():
        assert found[name] == value, f"{name} {why}"
    tally("faults survived")


@pytest.mark.parametrize(
    "kind", [kind if kind == "token" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.parametrize("share", [0.3, pytest.param(0.7, marks=pytest.mark.slow)])
def test_a_killed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(whole, kind, share):
    at = round(share * whole(kind)[3])
    recipe, _ = begun(whole, kind)
    assert struck(recipe, killed, at) == -signal.SIGKILL
    ends_as_whole(whole, kind)


# All kinds write with the same code, so one of them is killed everywhere and the others here and there.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "every"), [("lora", 1), ("sft", 23), ("token", 23), ("settle", 23)])
def test_a_run_may_be_killed_at_any_write_and_any_step(whole, kind, every):
    for at in range(1, whole(kind)[3] + 1, every):
        recipe, _ = begun(whole, kind)
        assert struck(recipe, killed, at) == -signal.SIGKILL
        ends_as_whole(whole, kind, f"after being killed at event {at}")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gets_there(whole):
    recipe, run = begun(whole, "lora")

    def work() -> None:
        Events(8, killed, ["training_step"])  # of three to four steps, three reach a checkpoint
        train.train(recipe, quiet=True, resume=(run / "recipe.yaml").is_file())

    deaths = 0
    while (code := forked(work)) and deaths < 5:
        assert code == -signal.SIGKILL
        deaths += 1
    assert 2 <= deaths < 5
    ends_as_whole(whole, "lora", f"after {deaths} deaths")


def test_resuming_a_finished_run_changes_nothing(whole):
    recipe, run = begun(whole, "lora")
    assert goes_on(recipe, run) == 0
    ends_as_whole(whole, "lora")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(whole, capfd, number, code):
    recipe, run = begun(whole, "settle")
    assert struck(recipe, sent(number), 5, ["training_step"]) == code  # the first half of the third step
    assert checkpoints.last(run).name == "checkpoint-3"
    assert "finishing this step" in capfd.readouterr().err
    assert not (run / "metrics.json").exists()
    ends_as_whole(whole, "settle")


def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(whole):
    recipe, run = begun(whole, "token")
    assert struck(recipe, sent(signal.SIGTERM), 2, ["prediction_step"]) == 143
    checkpoint = checkpoints.last(run)
    found = Moment.read(checkpoint)
    assert found.owed
    assert found.peak_bytes > 1e6
    much = 10**15  # more than the rest of the run will hold
    (checkpoint / checkpoints.MOMENT).write_text(json.dumps({**asdict(found), "peak_bytes": much}))
    ends_as_whole(whole, "token")
    assert json.loads((run / "metrics.json").read_text())["peak_bytes"] == much


@pytest.mark.slow
def test_a_signal_while_a_checkpoint_is_written_waits_for_it(whole):
    recipe, run = begun(whole, "sft")
    assert struck(recipe, sent(signal.SIGTERM), 1, ["save_file"]) == 143
    assert checkpoints.last(run).name == "checkpoint-5"
    ends_as_whole(whole, "sft")


def test_a_signal_after_the_last_step_is_not_lost(whole):
    recipe, _ = begun(whole, "lora")
    assert struck(recipe, sent(signal.SIGTERM), 1, ["_finalize_training"]) == 143
    ends_as_whole(whole, "lora")


def test_ctrl_c_twice_quits_at_once(whole):
    recipe, run = begun(whole, "lora")
    assert struck(recipe, sent(signal.SIGINT, 2), 3, ["training_step"]) == 130
    assert checkpoints.last(run) is None
    ends_as_whole(whole, "lora")


def test_signals_are_deferred_within_a_block_and_belong_to_their_old_owners_after():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with Signals() as signals:
            with signals.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                assert signals.agreed(torch.device("cpu")) == signal.SIGTERM
                with pytest.raises(SystemExit, match="143"), signals.deferred(False):
                    pytest.fail("a block that a signal ends was begun after the signal")
            with pytest.raises(SystemExit, match="143"):
                os.kill(os.getpid(), signal.SIGTERM)
        assert not heard
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_leave_other_threads_alone():
    def enter() -> Any:
        with Signals():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() == signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("at", [4, pytest.param(9, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow)])
def test_a_full_disk_ends_in_one_line_that_names_a_path_and_costs_nothing_that_was_written(whole, capfd, at):
    recipe, run = begun(whole, "lora")
    assert struck(recipe, full, at, ["fsync", "save_file", "safe_save_file"]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(str(run))
    assert said.endswith("No space left on device")
    assert not [p for p in run.rglob(".*")]
    ends_as_whole(whole, "lora")


def test_a_file_that_may_not_grow_leaves_the_previous_checkpoint(whole, capfd):
    recipe, run = begun(whole, "lora")

    def strike() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    assert struck(recipe, strike, 9, ["training_step"]) == 2  # after the checkpoint of step 3, before that of step 6
    assert f"{run}" in capfd.readouterr().err.splitlines()[-1]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["checkpoint-3"]
    ends_as_whole(whole, "lora")


def test_the_command_says_how_to_go_on(whole, capfd):
    folder, _, _, _ = whole("settle")
    _, run = begun(whole, "settle")

    def work() -> None:
        Events(3, sent(signal.SIGTERM), ["training_step"])
        sys.argv = ["lily", "train", str(folder / "recipe.yaml"), "--quiet"]
        cli.main()

    assert forked(work) == 143
    assert f"--resume continues from {run}/checkpoints/checkpoint-2" in capfd.readouterr().err
    tally("faults survived")


def test_a_checkpoint_holds_no_pickle(whole):
    recipe, run = begun(whole, "token")
    assert struck(recipe, killed, 8, ["training_step"]) == -signal.SIGKILL
    (checkpoint,) = (run / "checkpoints").iterdir()
    names = [p for p in checkpoint.rglob("*") if p.is_file()]
    assert {p.suffix for p in names} <= {".json", ".safetensors", ".md"}, names


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        "optimizer": {0: {"step": torch.tensor(3.0), "mean": torch.randn(3, 2)}, 1: {}},
        "groups": [{"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "params": [0, 1], "foreach": None}],
    }
    state_files.save_state(state, tmp_path, "s")
    found = state_files.load_state(tmp_path, "s")
    assert torch.equal(found["optimizer"][0].pop("mean"), state["optimizer"][0].pop("mean"))
    assert found == state


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            float(np.random.rand()),
            float(np.random.randn()),
            float(torch.rand(())),
        ]

    draw()  # gauss and randn keep a second number for the next time
    state_files.save_state(state_files.random_state(), tmp_path, "r")
    expected = draw()
    draw()
    state_files.set_random_state(state_files.load_state(tmp_path, "r"))
    assert draw() == expected


def test_a_state_that_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(LilyError, match=r"optimizer\.json is not a training state"):
        state_files.load_state(tmp_path, "optimizer")
    state_files.save_state([torch.ones(3)], tmp_path, "optimizer")
    os.truncate(tmp_path / "optimizer.safetensors", 40)
    with pytest.raises(LilyError, match=r"optimizer\.json is not a training state"):
        state_files.load_state(tmp_path, "optimizer")


@pytest.mark.parametrize(
    ("every", "step", "epoch", "last", "expected"),
    [
        ("epoch", 5, 1.0, False, True),
        ("epoch", 6, 1.2, False, False),
        ("epoch", 7, 1.4, True, True),
        (3, 6, 1.2, False, True),
        (3, 5, 1.0, False, False),
        (3, 7, 1.4, True, True),
    ],
)
def test_what_is_done_every_so_often_is_also_done_at_the_end(every, step, epoch, last, expected):
    assert due(every, step, epoch, last) is expected


def test_two_folders_swap_also_where_the_system_cannot_do_it_in_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "other")
    folder = tmp_path / "best"
    for text in ("old", "new"):
        with atomic.new_folder(folder, overwrite=True) as new:
            (new / "file").write_text(text)
    assert (folder / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
