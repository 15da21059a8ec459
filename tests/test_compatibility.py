"""The table of what works beside LoRA: its cells are tests that there are, and the page shows the outcomes of all."""

from __future__ import annotations

import ast
import json
import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import compatibility

CELLS = list(compatibility.cells())


@pytest.mark.parametrize("test", sorted({cell.test for _, _, cell in CELLS}))
def test_a_cell_names_a_test_that_there_is(test):
    path, _, function = test.partition("::")
    tree = ast.parse((ROOT / "tests" / path).read_text("utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_cell_has_tests_and_all_of_them_passed():
    outcomes = json.loads(compatibility.OUTCOMES.read_text("utf-8"))
    assert set(outcomes) == {f"{feature} | {column}" for feature, column, _ in CELLS}
    assert [name for name, of in outcomes.items() if of["other"] or not of["passed"]] == []


def test_the_page_shows_the_outcomes():
    outcomes = json.loads(compatibility.OUTCOMES.read_text("utf-8"))
    assert compatibility.table(outcomes) in compatibility.PAGE.read_text("utf-8")


def test_a_cell_selects_by_the_parameters_of_a_test():
    cell = compatibility.Cell("a/test_b.py::test_c", "token|sequence")
    assert cell.selects("tests/a/test_b.py::test_c[x-token]")
    assert not cell.selects("tests/a/test_b.py::test_c[x-static]")
    assert not cell.selects("tests/a/test_b.py::test_cd[token]")
