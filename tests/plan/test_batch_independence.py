"""What a sample's outputs depend on, beside LoRA (`benchmarks/batch_independence.py`): the committed rows are so."""

from __future__ import annotations

import importlib

import pytest
from paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")
# Of each kind: a sequence as long as its mask and not, (tokens, batch), gates of heads, causal, with a decoder.
SOME = ["bert", "layoutlmv3", "xlnet", "wavlm", "llama", "bart"]
CAUSAL_ENCODERS = {"clip_text_model", "clip", "clipseg", "groupvit", "metaclip_2", "owlv2", "owlvit"}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("batch_independence")


def stored(measured):
    return {(row["type"], row["measure"]): row for row in measured.stored(measured.ROWS)}


def test_the_types_that_differ_from_lora_have_a_reason(measured):
    rows = stored(measured)
    differ = {key for key, row in rows.items() if measured.verdict(row) not in ("neither", "both")}
    assert differ == {(name, "later tokens") for name in CAUSAL_ENCODERS}
    page = (ROOT / "docs" / "migrate-from-lora.md").read_text("utf-8")
    assert all(f"`{name}`" in page for name, _ in differ)


def test_the_measure_would_find_what_it_looks_for(measured):
    for row in stored(measured).values():
        assert row["batch"] > 10 * measured.TOLERANCE, row


def test_the_page_has_the_table_of_the_committed_rows(measured):
    page = (ROOT / "docs" / "migrate-from-lora.md").read_text("utf-8")
    assert measured.table(measured.stored(measured.ROWS)) in page, "run benchmarks/batch_independence.py --show"


@pytest.mark.parametrize("only", [SOME, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_rows_are_as_committed(only, measured):
    kept = {key: row for key, row in stored(measured).items() if only is None or row["type"] in only}
    rows = list(measured.rows(only))
    assert [(row["type"], row["measure"]) for row in rows] == list(kept)
    for row, then in zip(rows, kept.values(), strict=True):
        assert (measured.verdict(row), row["routing"]) == (measured.verdict(then), then["routing"]), (row, then)
