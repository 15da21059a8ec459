"""The study of structures: what it runs next, what it chooses, and the pages' tables of its rows."""

from __future__ import annotations

import importlib

import pytest
from paths import ROOT

from lily import LilyError
from lily.analysis.plots import curves_plot


@pytest.fixture
def structure(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("structure")


def row(loss):
    return {"validation": {"loss": loss, "accuracy": 0.0}, "parameters": 1, "seconds": 1.0}


def test_seed_0_chooses_a_rate_inside_the_grid_and_the_others_compare_there(structure, monkeypatch):
    monkeypatch.setattr(structure, "options", lambda model, arm, size: {"r": int(size)} if size >= 1 else None)
    study = structure.tuned("random-labels", ["LoRA"], [0.5, 2], (1e-3, 2e-3), seeds=3)
    rows = {}

    def next_runs(losses):
        runs = [run for run in study(rows) if run not in rows]
        rows.update({run: row(losses.get(run.rate, 0.1)) for run in runs})
        return [(run.size, run.rate, run.seed) for run in runs]

    assert next_runs({1e-3: 0.5, 2e-3: 0.3}) == [(2, 1e-3, 0), (2, 2e-3, 0)]  # size 0.5 does not exist
    assert next_runs({4e-3: 0.2}) == [(2, 4e-3, 0)]  # the best was at the end
    assert next_runs({8e-3: 0.9}) == [(2, 8e-3, 0)]
    assert next_runs({}) == [(2, 4e-3, 1), (2, 4e-3, 2), (2, 4e-3, 3)]
    assert next_runs({}) == []
    runs, inside = structure.chosen(rows, "random-labels", "LoRA", 2)
    assert inside
    assert [run.seed for run, _ in runs] == [1, 2, 3]


@pytest.mark.parametrize(("task", "chance"), [("random-labels", 2.3), ("pairs", 10.8)])
def test_a_loss_that_is_not_finite_counts_as_chance(task, chance, structure):
    run = structure.Run(task, "LoRA", 1, (), 1e-3, 0)
    assert structure.score(run, row(float("nan"))) == structure.score(run, row(99.0)) == pytest.approx(chance, abs=0.1)
    assert structure.score(run, row(1.0)) == 1.0


@pytest.mark.parametrize("marker", ["rates", "structure"])
def test_the_pages_show_the_committed_rows_of_the_map(marker, structure):
    import performance

    page, table = structure.TABLES[marker]
    assert performance.shown(page)[marker] == table(structure.stored())


def test_the_best_rate_is_between_the_rates_of_the_grid(structure):
    lowest, inside = structure.optimum({1e-3: 0.5, 2e-3: 0.3, 4e-3: 0.4})
    assert inside
    assert 2e-3 < lowest < 3e-3  # the parabola leans to the lower neighbor
    assert structure.optimum({1e-3: 0.5, 2e-3: 0.3}) == (2e-3, False)
    assert structure.optimum({1e-3: 0.5, 2e-3: 0.3, 4e-3: 1.4}) == (2e-3, True)  # fails at the next rate
    even, _ = structure.optimum({1e-3: 1.0, 2e-3: 0.5, 4e-3: 1.0})
    assert even == pytest.approx(2e-3)


def test_the_page_of_the_map_draws_lines_of_several_seeds(tmp_path):
    picture = curves_plot({"a": {"LoRA": [(1.0, [2.0, 4.0]), (2.0, [1.0])], "pair": [(1.0, [5.0])]}}, "rate", "loss")
    assert picture.alt == "loss over rate. a, LoRA: lowest 1 at 2; a, pair: lowest 5 at 1."
    picture.save(tmp_path / "drawn.svg")
    assert "pair" in (tmp_path / "drawn.svg").read_text()
    with pytest.raises(LilyError, match="nothing was trained"):
        curves_plot({"a": {}}, "rate", "loss")
