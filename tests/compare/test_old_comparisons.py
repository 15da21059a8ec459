"""Comparisons that an earlier version wrote are continued and read; see tests/support/old_searches.py."""

from __future__ import annotations

import json
from pathlib import Path

from old_searches import COMPARE, FINISHED, failing_start, unpacked
from typer.testing import CliRunner

from lily.cli.main import app
from lily.search import runner

FIXTURES = Path(__file__).parent / "fixtures"


def table_of(page):
    return [line for line in page.read_text().splitlines() if line.startswith("|")]


def test_an_unfinished_comparison_of_an_earlier_version_repeats_no_run(tmp_path, monkeypatch):
    unpacked(FIXTURES / "compare", tmp_path)
    tuning = tmp_path / "compare/tiny/tuning"
    finished = {f"tuning/{p.parent.relative_to(tuning)}" for p in tuning.glob("*/*/metrics.json")}
    started = []
    monkeypatch.setattr(runner, "_start", failing_start(started))
    done = CliRunner().invoke(app, COMPARE)
    started = [job.name for job in started]
    assert len(finished) == 5
    assert not finished & set(started)
    # the learning rate of LoRA that was running; the scales at the best learning rates; the comparison at the best
    assert started[0] == "tuning/lora/rate0.02-scale30"
    assert sorted(started[1:5]) == [
        *(f"tuning/lily/rate0.01-scale{scale}" for scale in (2, 8)),
        *(f"tuning/lora/rate0.01-scale{scale}" for scale in (15, 60)),
    ]
    assert started[5:] == ["lily/0", "lora/0"]
    assert "all runs of tiny failed: not now" in done.stderr


def test_a_finished_comparison_of_an_earlier_version_is_read_and_trains_nothing(tmp_path, monkeypatch):
    unpacked(FIXTURES / "finished", tmp_path)
    folder = tmp_path / "finished/tiny"
    table, figures = table_of(folder / "comparison.md"), json.loads((folder / "comparison.json").read_text())
    summary = CliRunner().invoke(app, ["compare", "--summary", "finished"], catch_exceptions=False).output
    assert "| tiny | accuracy | 12 | 1 |" in summary
    monkeypatch.setattr(runner, "_start", None)
    done = CliRunner().invoke(app, FINISHED, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    in_one_unit = {"learning rate": "rate", "seconds": "s", "scaling 4": "4", "alpha 30": "2"}
    for then, now in in_one_unit.items():
        table = [line.replace(f"| {then} |", f"| {now} |") for line in table]
    assert table_of(folder / "comparison.md") == table
    again = json.loads((folder / "comparison.json").read_text())
    del figures["setting"]["threads"], again["setting"]["threads"]  # the machine's
    for entry in figures["entries"]:
        entry["one_class"] = 0  # a key that came later
    assert again == figures
