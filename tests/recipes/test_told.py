"""What the commands say while they work, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from recipes_helpers import classification, rows, sft, write_jsonl, write_recipe
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import loader, packages, work
from lily.recipes.results.header import _steps


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result


@pytest.fixture(scope="module")
def spoken(tmp_path_factory, encoder):
    """A run with all baselines: its folder, and what was said."""
    folder = tmp_path_factory.mktemp("spoken")
    values = classification(encoder, write_jsonl(folder / "t.jsonl", rows()), folder)
    values |= {"baselines": ["majority", "tfidf", "frozen", "lora"]}
    values["train"] |= {"epochs": 2}
    path = write_recipe(folder, values)
    return folder / "run", path, invoke("train", path)


def test_a_run_says_what_it_trains_and_a_line_for_every_evaluation_of_every_contestant(spoken):
    run, _, said = spoken
    lines = [line for line in said.stderr.splitlines() if not line.startswith("warning: ")]
    assert lines[0] == "tiny  text-classification, seed 0"
    header = lines[1 : lines.index("")]
    titled = [line.split()[0] for line in header if not line.startswith("          ")]
    assert titled == ["model", "data", "method", "steps", "into"]
    evaluations = re.compile(r"^(lily|lora) +epoch (\d)/2  loss \d\.\d{4}  accuracy +\d+\.\d( +best)?( .*left)?$")
    found = [match for line in lines if (match := evaluations.match(line))]
    assert [(match[1], match[2]) for match in found] == [("lily", "1"), ("lily", "2"), ("lora", "1"), ("lora", "2")]
    assert found[0][3]
    for name in ("majority", "TF-IDF", "frozen encoder", "lora"):
        assert [line for line in lines if re.match(rf"{name} +test rows +accuracy", line)], name
    assert str(run) in said.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.epochs=1"], "1 epoch in batches of 4, evaluated every epoch"),
        (["train.epochs=0.5", "train.evaluate_every=3"], "0.5 epochs in batches of 4, evaluated every 3 steps"),
        (["train.max_steps=1", "train.evaluate_every=1"], "1 step in batches of 4, evaluated every step"),
        (["train.max_steps=1200"], "1,200 steps in batches of 4, evaluated every epoch"),
    ],
)
def test_numbers_of_steps_agree_with_their_nouns(changes, said):
    assert _steps(loader.load_recipe("quickstart", [*changes, "train.batch_size=4"])) == said


def test_what_is_said_to_a_file_has_no_escape_codes_and_no_carriage_returns(spoken):
    for stream in (spoken[2].stderr, spoken[2].stdout):
        assert "\x1b" not in stream
        assert "\r" not in stream
        assert "eval_loss" not in stream


def test_the_log_has_what_was_said_and_what_the_trainer_logged(spoken):
    run, _, said = spoken
    log = (run / "train.log").read_text("utf-8")
    for line in said.stderr.splitlines():
        assert line in log
    assert '"eval_loss"' in log
    assert "also in train" in log  # the tables of the data
    assert not (run / "lora" / "train.log").exists()


def test_a_run_ends_with_a_sentence_and_commands(spoken):
    run, path, said = spoken
    assert "has accuracy" in said.stdout
    after = said.stdout.split("\nnext:\n")[1]
    assert f"  lily predict {run} --input rows.csv" in after
    assert f"  lily compare {path}" in after


def test_the_work_that_was_expected_is_the_work_that_was_done(spoken, monkeypatch):
    from lily.progress.progress import Progress
    from lily.recipes import train

    recipe = loader.load_recipe(spoken[1], [f"output={spoken[0].parent / 'again'}", "baselines=[lora]"])
    expected = {}

    def noted(run, prepared):
        expected.update(work.work_of(recipe, prepared.splits, len(prepared.train)))
        whole(run, prepared)

    whole = train.Run.expect
    monkeypatch.setattr(train.Run, "expect", noted)
    with Progress() as told, told.active():
        train.train(recipe, told=told)
    for stage in ("untrained", "training", "test"):
        assert told.estimate.done("lily", stage) == expected[stage]
        assert told.estimate.done("lora", stage) == expected[stage]
    assert told.estimate.left() == 0.0


def test_quiet_says_nothing_and_verbose_shows_the_trainers_own_lines(spoken, tmp_path):
    path = spoken[1]
    short = ["train.max_steps=1", "baselines=[]"]
    quiet = invoke("train", path, *short, f"output={tmp_path / 'quiet'}", "--quiet")
    assert "epoch" not in quiet.stderr
    assert "step 1" in (tmp_path / "quiet" / "train.log").read_text()
    verbose = invoke("train", path, *short, f"output={tmp_path / 'verbose'}", "--verbose")
    assert "eval_loss" in verbose.stdout
    assert "step 1/1" in verbose.stderr


def test_predictions_end_with_what_they_are(spoken, tmp_path):
    run = spoken[0]
    table = write_jsonl(tmp_path / "new.jsonl", [{"text": row["text"]} for row in rows(20)])
    said = invoke("predict", run, "--input", table, "--output", tmp_path / "out.jsonl").stderr
    assert re.search(
        r"^20 rows predicted: .*\. \d+ ha\w+ a score below 0\.6: look at these first\.", said, re.MULTILINE
    )
    piped = invoke("predict", run, "--input", table)
    assert len([json.loads(line) for line in piped.stdout.splitlines()]) == 20


def test_a_collapse_ends_with_what_it_changed(spoken, tmp_path):
    said = invoke("collapse", spoken[0], "--out", tmp_path / "static")
    assert re.search(r"adapter's outputs move .*, and accuracy goes from \d+\.\d to \d+\.\d", said.stdout)
    assert f"lily export {tmp_path / 'static'} --to lora" in said.stdout


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_the_losses_and_metrics_of_every_evaluation(tmp_path, chat_model):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    table = [{"question": f"question {r['text']}", "answer": ("no", "yes")[int(r["label"])]} for r in rows()]
    values = sft(chat_model, write_jsonl(tmp_path / "t.jsonl", table), tmp_path)
    values["train"] |= {"max_steps": 4, "evaluate_every": 2, "report_to": ["tensorboard"]}
    invoke("train", write_recipe(tmp_path, values))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    history = json.loads((tmp_path / "run" / "metrics.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [2, 4]
    for tag, name in (("eval/loss", "loss"), ("eval/exact_match", "exact_match")):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in shown] == [2, 4], tag
        assert [value for _, value in shown] == pytest.approx([entry[name] for entry in history], rel=0.05), tag
    assert "train/train_loss" in events.Tags()["scalars"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_dashboard_that_is_not_installed_is_told_before_anything_is_imported(spoken, monkeypatch, name):
    recipe = loader.load_recipe(spoken[1], [f"train.report_to=[{name}]"])
    found = packages.find_spec
    missing = (name, "tensorboardX")
    monkeypatch.setattr(packages, "find_spec", lambda asked: None if asked in missing else found(asked))
    with pytest.raises(LilyError, match=f"{name} is not installed; pip install {name}"):
        packages.check_packages(recipe)
