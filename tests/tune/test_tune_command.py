"""`lily tune` from the command line, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from recipes_helpers import classification, write_recipe
from rich.console import Console
from typer.testing import CliRunner

from lily.cli.main import app
from lily.cli.tune import parse_time
from lily.errors import LilyError
from lily.recipes import loader, train
from lily.tune.report import print_tuned, verdict
from lily.tune.run import TuneResult
from lily.tune.space import Range, Space
from lily.tune.study import TrialResult

TINY = ["train.epochs=2", "train.batch_size=18"]


def lily(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})


def test_a_search_ends_with_a_table_and_a_recipe_that_gives_what_its_trial_gave(tmp_path, encoder, table):
    source = write_recipe(tmp_path, classification(encoder, table, tmp_path))
    command = ["tune", source, *TINY, "--trials", "2", "--range", "scaling=1:8", "--output", "found"]
    done = lily(*command)
    assert done.exit_code == 0, done.output
    assert "2 trials on 12 validation rows" in done.output
    assert "own: the recipe's own values" in done.output
    assert "on the test rows, which no trial has seen" in done.output
    found = json.loads((tmp_path / "found" / "tune.json").read_text())
    assert [t["state"] for t in found["trials"]] == ["complete", "complete"]
    assert all(t["seconds"] > 0 and t["parameters"] > 0 for t in found["trials"])
    best = loader.load_recipe(str(tmp_path / "found" / "best.yaml"))
    result = train.train(best, quiet=True)
    assert result.best["value"] == found["best"]["value"]
    assert result.split == "test"
    again = lily(*command)
    assert again.exit_code == 0
    assert json.loads((tmp_path / "found" / "tune.json").read_text()) == found
    data = Path(loader.load_recipe(source).data.train.path)
    data.write_text("".join(reversed(data.read_text("utf-8").splitlines(keepends=True))), "utf-8")
    with pytest.raises(LilyError, match=r"trials/000 has other rows of data\.test, data\.train"):
        lily(*command)


@pytest.mark.parametrize(
    ("tested", "said"),
    [(True, "no trial has seen"), (False, "expect a worse result on rows that were not used to choose")],
)
def test_it_is_said_whether_rows_are_left_to_test_the_choice_on(tmp_path, tested, said):
    tried = TrialResult(0, "complete", {"scaling": 1.0}, 0.5)
    space = Space("lily", {"scaling": Range(0.5, 2.0, 1.0)})
    found = TuneResult("a", "lily", "accuracy", 12, tested, space, (tried,), tried, {}, tmp_path / "[v2]" / "best.yaml")
    console = Console(record=True, width=200)
    print_tuned(found, tmp_path / "[v2]", console)
    text = console.export_text()
    assert said in text
    for name in ("best.yaml", "tune.json"):
        assert str(tmp_path / "[v2]" / name) in text


@pytest.mark.parametrize(
    ("metric", "own", "best", "words"),
    [
        ("accuracy", (0.5, None), (0.75, None), "accuracy 75.0, 25.0 points better than the recipe's own values"),
        ("loss", (0.5, None), (0.25, None), "loss 0.2500, 0.2500 better than the recipe's own values"),
        ("accuracy", (0.75, 0.4), (0.5, 0.1), "accuracy 50.0, 25.0 points worse than the recipe's own values, which"),
        ("loss", (0.25, 0.4), (0.5, 0.1), "loss 0.5000, 0.2500 worse than the recipe's own values, which forget more"),
        ("accuracy", (0.5, 0.4), (0.5, 0.1), "accuracy 50.0, the same as the recipe's own values, which forget more."),
    ],
)
def test_the_best_trial_is_compared_with_the_recipes_own_values(metric, own, best, words):
    space = Space("lily", {"scaling": Range(0.5, 2.0, 1.0)})
    trials = tuple(
        TrialResult(number, "complete", {"scaling": 1.0}, value, forgetting=forgetting)
        for number, (value, forgetting) in enumerate([own, best])
    )
    found = TuneResult("a", "lily", metric, 12, True, space, trials, trials[1])
    assert words in verdict(found)
    assert verdict(replace(found, space=replace(space, without=("scaling",)))).endswith(f" {words.split()[1][:-1]}.")


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("1.5h", 5400), ("7", 7), ("7s", 7)])
def test_times_are_read(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "1d", "nan"])
def test_a_time_that_is_none_is_quoted(text):
    with pytest.raises(LilyError, match="expected a time such as 90m"):
        parse_time(text)


@pytest.mark.slow
def test_a_search_without_optuna_says_what_to_install_and_a_sweep_does_without():
    code = """
import sys
sys.modules["optuna"] = None
import lily.tune.sweep, lily.tune.sweep_report
sys.argv = ["lily", "tune", "quickstart"]
from lily.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == 'error: optuna is not installed; pip install "lily-peft[tune]"'
