"""What Lily adapts of every model type beside LoRA (`benchmarks/model_types.py`): the committed rows are so."""

from __future__ import annotations

import importlib

import pytest
from paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")
SOME = ["bert", "qwen3_moe", "siglip", "gemma3", "resnet", "wavlm"]
WAYS = ("all-linear", "expression")


@pytest.fixture
def model_types(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("model_types")


def by_type(model_types):
    return {(row["library"], row["type"]): row for row in model_types.stored()}


def test_no_type_is_refused_and_each_that_has_fewer_layers_says_why(model_types):
    rows = by_type(model_types)
    verdicts = [model_types.verdict(row, how) for row in rows.values() for how in WAYS]
    assert verdicts.count("as many layers") > 900
    assert "refused by Lily alone" not in verdicts
    for row in rows.values():
        for how in WAYS:
            if model_types.verdict(row, how) == "fewer layers":
                assert all("without calling it" in why for why in row[how]["left out"]), row


@pytest.mark.parametrize("only", [SOME, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_rows_are_as_committed(only, model_types):
    pytest.importorskip("diffusers")
    kept, seen = by_type(model_types), 0
    for row in model_types.rows(only):
        seen += 1
        then = kept[row["library"], row["type"]]
        for how in WAYS:
            assert model_types.verdict(row, how) == model_types.verdict(then, how), (row, then)
    assert seen == len(only or kept)
