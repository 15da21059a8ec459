"""A run that an earlier version began is resumed to the end that it would have had, and is read as its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from paths import ROOT
from runs import invoke
from safetensors.torch import load_file

from lily.recipes import loader, train


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "fixtures" / "earlier", tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")


def test_a_run_of_an_earlier_version_is_resumed_to_the_same_end(earlier):
    before = json.loads(Path("run/metrics.json").read_text())["history"]
    train.train(loader.load_recipe("recipe.yaml"), resume=True, quiet=True)
    after = json.loads(Path("run/metrics.json").read_text())["history"]
    assert (len(before), len(after), after[: len(before)]) == (2, 4, before)
    expected, got = load_file("expected.safetensors"), load_file("run/last/adapter_model.safetensors")
    assert expected.keys() == got.keys()
    assert all((got[name] - expected[name]).abs().max() <= 1e-5 for name in expected)


def test_a_run_of_an_earlier_version_is_evaluated_and_predicts(earlier):
    assert "accuracy" in invoke("eval", "run")
    invoke("predict", "run", "--input", "rows.jsonl", "--output", "predicted.jsonl", "--prefix", "lily_")
    assert len(Path("predicted.jsonl").read_text().splitlines()) == 60
