"""PEFT's own tests with Lily in LoRA's place: how outcomes are counted, and what of them is on the page."""

from __future__ import annotations

import importlib
import json

import pytest
from paths import ROOT


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("peft_suite")


def row(test, outcome, error="", lily=True):
    return {"test": f"tests/test_mixed.py::{test}", "outcome": outcome, "error": error, "lily": lily}


OUTCOMES = {
    "plain": [row(test, "passed", lily=False) for test in ("a", "b", "c", "d")] + [row("e", "failed", lily=False)],
    "beside": [row("a", "failed"), row("b", "passed")],
    "static": [
        *(row(test, "started", "the process ended", lily=False) for test in ("a", "b", "c", "d", "e")),
        row("a", "passed"), row("a", "failed", "an error at the end"), row("b", "failed", "safe_serialization=False"),
        row("c", "passed", lily=False), row("e", "failed"),
    ],
}  # fmt: skip


def test_tests_count_that_lora_passes_and_that_make_a_configuration(suite, tmp_path):
    for way, rows in OUTCOMES.items():
        (tmp_path / f"{way}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = suite.summary(tmp_path)
    assert found["files"] == {
        "mixed": {"plain": 4, "beside": 1, "default": {"passed": 0, "failed": 0}, "static": {"passed": 0, "failed": 3}}
    }
    assert found["differ"] == ["tests/test_mixed.py::a"]
    assert [(one["test"], one["error"]) for one in found["unknown"]] == [
        ("tests/test_mixed.py::a", "an error at the end"),
        ("tests/test_mixed.py::d", "the process ended"),
    ]
    assert sum(found["reasons"]["static"].values()) == 1
    assert "| `test_mixed.py` | 4 | 1 | - | 0 of 3 |" in suite.table(found)


def test_every_failure_has_a_reason_and_the_page_shows_the_figures(suite):
    found = json.loads(suite.FIGURES.read_text("utf-8"))
    assert found["unknown"] == []
    # those of PEFT's own Lily, and one of a message that lists the methods
    listing = "test_hotswap_wrong_peft_types_raises"
    assert all("::TestLily" in test or "[LilyConfig" in test or listing in test for test in found["differ"])
    assert suite.table(found) in suite.PAGE.read_text("utf-8")
