"""Searches and sweeps that an earlier version left unfinished are continued; see tests/support/old_searches.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from old_searches import SWEEP, TUNE, failing_start, unpacked
from searching import FakeTraining
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import train
from lily.search import runner

FIXTURES = Path(__file__).parent / "fixtures"


def test_a_search_of_an_earlier_version_keeps_its_trials_and_resumes_the_one_that_was_running(tmp_path, monkeypatch):
    unpacked(FIXTURES / "tune", tmp_path)
    training = FakeTraining()
    monkeypatch.setattr(train, "train", training)
    before = json.loads((tmp_path / "tune/tune.json").read_text())
    done = CliRunner().invoke(app, TUNE, catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert [train.output_folder(r).name for r in training.recipes] == ["003", "004"]
    assert [flags["resume"] for flags in training.flags] == [True, False]
    lily = training.recipes[0].lily
    assert (lily.learning_rate, lily.scaling, lily.num_A, lily.num_B, lily.r) == (0.0124, 12.7, 3, 3, 12)
    after = json.loads((tmp_path / "tune/tune.json").read_text())
    assert before["trials"][:3] == after["trials"][:3]
    assert {**before, "trials": 0, "importance": 0} == {**after, "trials": 0, "best": before["best"], "importance": 0}
    assert [trial["state"] for trial in after["trials"]] == ["complete"] * 5
    assert "5 trials on 12 validation rows" in done.output


def test_a_sweep_of_an_earlier_version_trains_only_what_is_not_finished(tmp_path, monkeypatch):
    unpacked(FIXTURES / "sweep", tmp_path)
    started = []
    monkeypatch.setattr(runner, "_start", failing_start(started))
    done = CliRunner().invoke(app, SWEEP, catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert [(job.name, job.until) for job in started] == [("r16-A2-B2/0", None), ("lora/0", None)]
    found = json.loads((tmp_path / "sweep/granularity.json").read_text())
    assert {
        entry["name"]: (entry["steps"], bool(entry["held_out"]), entry["failed"]) for entry in found["entries"]
    } == {
        "r32-A1-B1": (20, True, []),
        "r16-A2-B2": (0, False, [0]),
        "r15-A1-B3": (10, False, []),
        "r12-A3-B3": (10, False, []),
        "lora": (0, False, [0]),
    }


@pytest.mark.parametrize("command", [[*TUNE, "seed=3"], [*SWEEP, "seed=3"]], ids=lambda c: c[0])
def test_other_settings_do_not_continue_a_search_of_an_earlier_version(tmp_path, command):
    unpacked(FIXTURES / command[0], tmp_path)
    with pytest.raises(LilyError, match=r"recipe\.seed was 0 and is now 3"):
        CliRunner().invoke(app, command, catch_exceptions=False)
