"""The shapes of one budget, trained: which, how long, and what is kept of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from helpers import tally
from recipes_helpers import classification, write_recipe
from rich.console import Console
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import loader
from lily.search.runner import Job, Outcome, described
from lily.tune import sweep as granularity
from lily.tune import sweep_report
from lily.tune.space import AdapterShape
from lily.tune.sweep import LORA, SweepOptions, prepare, sweep, thinned


@pytest.fixture
def make(tmp_path, encoder, table):
    def made(*overrides):
        path = write_recipe(tmp_path, classification(encoder, table, tmp_path, lily={"r": 16, "num_A": 2, "num_B": 2}))
        return loader.load_recipe(path, list(overrides))

    return made


class FakeRuns:
    """In place of `lily.search.runner.run`: figures follow from the rank; some runs fail."""

    def __init__(self, failing=(), ending=None):
        self.failing, self.ending, self.jobs = failing, ending, []

    def __call__(self, jobs, out, count, threads, lock, announce):
        outcomes = {}
        for job in jobs:
            job.check()
            if job.done:
                outcomes[job.name] = Outcome(json.loads((job.folder / "metrics.json").read_text()))
                continue
            if self.ending == job.name:
                raise KeyboardInterrupt
            self.jobs.append(job)
            outcomes[job.name] = self._outcome(job)
            announce(f"{job.name}{described(job, outcomes[job.name])}")
        return outcomes

    def _outcome(self, job):
        if job.name in self.failing:
            return Outcome(None, "diverged")
        value = 0.5 + job.recipe.lily.r / 1000 + job.recipe.seed / 100
        figures = {
            "metric": "accuracy",
            "seconds": {},
            "split": "validation" if job.trial else "test",
            "before": {} if job.trial else {"accuracy": 0.5},
            "best": {"epoch": 1.0, "value": value},
            "final": {"accuracy": value - 0.1},
            "parameters": {"adapter": 1234},
            "history": [{"step": job.until or 30}],
            "forgetting": {},
        }
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "metrics.json").write_text(json.dumps(figures))
        if not job.trial:
            (job.folder / "predictions.json").touch()
        return Outcome(figures)


@pytest.fixture
def trained(tmp_path, make, monkeypatch):
    def run(runs=None, overrides=(), said=None, name="sweep", **how):
        monkeypatch.setattr(granularity, "run", runs or FakeRuns())
        wish = SweepOptions(**how)
        return sweep(make(*overrides), tmp_path / name, wish, announce=(said if said is not None else []).append)

    return run


def test_every_shape_is_trained_with_every_seed_and_costs_the_same(trained, make):
    runs = FakeRuns()
    found = trained(runs, seeds=2, grid=True)
    names = [entry.name for entry in found.entries]
    assert "r16-A2-B2" in names
    assert len(runs.jobs) == 2 * len(names) > 6
    assert [entry.r for entry in found.entries] == sorted((entry.r for entry in found.entries), reverse=True)
    for entry in found.entries:
        assert entry.validation == pytest.approx((0.5 + entry.r / 1000, 0.51 + entry.r / 1000))
        assert entry.held_out == pytest.approx((0.4 + entry.r / 1000, 0.41 + entry.r / 1000))
    tried = {(j.recipe.lily.num_A, j.recipe.lily.num_B, j.recipe.lily.r, j.recipe.lily.params) for j in runs.jobs}
    assert tried == {(entry.num_A, entry.num_B, entry.r, None) for entry in found.entries}
    assert all(
        0.9 * found.budget <= shape.parameters <= found.budget for shape in prepare(make(), SweepOptions()).shapes
    )


def test_the_worse_half_is_given_up_at_every_rung_and_the_rest_goes_on(trained):
    runs, said = FakeRuns(), []
    found = trained(runs, halving=True, grid=True, most=8, said=said)
    begun = [j for j in runs.jobs if j.until == min(j.until for j in runs.jobs if j.until)]
    complete = [entry for entry in found.entries if entry.held_out]
    assert len(begun) == len(found.entries) > len(complete) == 2
    assert complete == list(found.entries[:2])  # rank is quality here
    assert all(j.trial == (j.until is not None) for j in runs.jobs)
    assert all(j.recipe.train.early_stopping is None for j in runs.jobs)
    assert any("continue" in line for line in said)
    assert all(entry.validation for entry in found.entries)


def test_a_sweep_that_is_killed_goes_on(trained):
    whole, runs = trained(FakeRuns(), seeds=2), FakeRuns(ending="r16-A2-B2/1")
    with pytest.raises(KeyboardInterrupt):
        trained(runs, name="killed", seeds=2)
    again = FakeRuns()
    assert trained(again, name="killed", seeds=2) == whole
    assert len(again.jobs) == 2 * len(whole.entries) - len(runs.jobs)
    assert trained(FakeRuns(failing=[job.name for job in again.jobs]), name="killed", seeds=2) == whole
    tally("faults survived")


def test_a_failed_run_is_told_and_the_others_count(trained):
    said = []
    found = trained(FakeRuns(failing=("r16-A2-B2/0",)), seeds=2, said=said)
    entry = next(e for e in found.entries if e.name == "r16-A2-B2")
    assert entry.failed == (0,)
    assert len(entry.validation) == 1
    assert any("r16-A2-B2/0 failed: diverged" in line for line in said)
    with pytest.raises(LilyError, match="all runs of tiny failed"):
        trained(FakeRuns(failing=tuple(f"{e.name}/0" for e in found.entries)), name="failed")
    tally("faults survived")


def test_lora_of_equal_size_is_trained_beside_them(trained):
    runs = FakeRuns()
    found = trained(runs, lora=True, seeds=1)
    assert found.entries[-1].name == LORA
    lora = next(j.recipe for j in runs.jobs if j.name == "lora/0")
    assert lora.method == "lora"
    picture = sweep_report.picture(found)
    assert "LoRA of equal size" in picture.alt
    assert picture.alt.count("num_A=") == len(found.entries) - 1
    labels = picture.figure.axes[0].get_legend().get_texts()
    assert {t.get_text() for t in labels} == {"Lily, num_A = num_B", "LoRA of equal size"}


def test_the_table_and_the_picture_tell_every_shape(trained, tmp_path):
    found = trained(seeds=2, grid=True)
    console = Console(record=True, width=200)
    sweep_report.print_sweep(replace(found, name="tiny [v2]"), tmp_path / "[v3]", console)
    text = console.export_text()
    assert "tiny [v2]: " in text
    assert f"{tmp_path}/[v3]/granularity.json" in text
    assert all(entry.name in text for entry in found.entries)
    assert "2 seeds, mean and standard deviation" in text
    sweep_report.picture(found).save(tmp_path / "a.svg")
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_shapes_that_are_equal_have_no_best_one(trained):
    found = trained(FakeRuns())
    equal = replace(found, entries=tuple(replace(entry, held_out=(0.5,)) for entry in found.entries))
    assert sweep_report.verdict(equal) == (
        f"All shapes have the same accuracy (50.0) on {found.rows} test rows, so nothing here tells which is better."
    )


def test_shapes_that_were_given_up_are_not_drawn_beside_complete_ones(trained):
    found = trained(halving=True, grid=True, most=8, lora=True)
    complete = [e for e in found.entries if e.held_out]
    given_up = [e for e in found.entries if not e.held_out]
    assert len(complete) == 3  # two shapes and LoRA
    picture = sweep_report.picture(found)
    assert "accuracy on the test rows (%) of 2 shapes of equal size" in picture.alt
    assert picture.alt.count("num_A=") == 2
    for entry in given_up:
        assert f"{entry.name} (stopped after {entry.steps} steps)" in picture.alt
    assert picture.figure.axes[0].get_ylabel() == "accuracy on the test rows (%)"
    assert "LoRA of equal size" in picture.alt

    lost = [replace(e, held_out=(), validation=(), failed=(0,)) if e in complete[:2] else e for e in found.entries]
    picture = sweep_report.picture(replace(found, entries=tuple(lost)))
    furthest = [e for e in given_up if e.steps == max(e.steps for e in given_up)]
    assert f"accuracy on the validation rows (%) of {len(furthest)} shapes" in picture.alt
    assert "LoRA" not in picture.alt  # which was trained for longer
    assert f"{complete[0].name} (failed)" in picture.alt


def test_many_shapes_are_thinned_out_evenly_and_the_recipes_own_stays():
    shapes = [AdapterShape(r, r, None, 1, 100) for r in (33, *range(100, 0, -1))]
    chosen = thinned(shapes, 5)
    assert len(chosen) == 5
    assert [s.r for s in chosen] == sorted((s.r for s in chosen), reverse=True)
    assert shapes[0] in chosen
    assert {chosen[0].r, chosen[-1].r} == {100, 1}
    assert thinned(shapes[:3], 5) == (shapes[1], shapes[2], shapes[0])


def test_a_paused_run_counts_as_done_for_its_rung_and_no_further(tmp_path, make):
    def job(until, trial=True):
        return Job("a/0", make(), tmp_path / "run", trial, until)

    assert not job(10).done
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"history": [{"step": 5}, {"step": 12}]}))
    assert job(10).done
    assert job(12).done
    assert not job(13).done
    assert not job(None, trial=False).done


@pytest.mark.parametrize(
    ("overrides", "wish", "message"),
    [
        (["method=lora"], SweepOptions(), "method: lora has no granularity"),
        (["lily.groups={query: {r: 2}}"], SweepOptions(), r"lily\.groups sets the shape of some groups"),
        ([], SweepOptions(most=1), "at least two shapes"),
        ([], SweepOptions(seeds=0), "at least two shapes .* and one seed"),
        ([], SweepOptions(budget="10"), "no shape uses 10 parameters well"),
        (["data.columns.text=texts"], SweepOptions(), "no column 'texts'"),
    ],
    ids=str,
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(make, tmp_path, overrides, wish, message):
    with pytest.raises(LilyError, match=message):
        sweep(make(*overrides), tmp_path / "sweep", wish, announce=print)
    assert not (tmp_path / "sweep").exists()
    tally("inputs rejected")


@pytest.mark.slow
def test_a_halving_trains_real_models_to_their_rungs_and_the_best_to_the_end(tmp_path, make):
    make("train.epochs=4")
    command = [
        "sweep",
        "recipe.yaml",
        "train.epochs=4",
        "--grid",
        "--points",
        "4",
        "--halving",
        "--lora",
        "--output",
        "s",
    ]
    done = CliRunner().invoke(app, command, catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "s" / "granularity.json").read_text())
    shapes, lora = found["entries"][:-1], found["entries"][-1]
    assert sorted(entry["steps"] for entry in shapes) == [10, 10, 20, 20]
    assert [bool(entry["held_out"]) for entry in shapes] == [entry["steps"] == 20 for entry in shapes]
    assert lora["name"] == "lora"
    assert lora["held_out"]
    assert (tmp_path / "s" / "granularity.svg").is_file()
    before = (tmp_path / "s" / "granularity.json").read_text()
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "s" / "granularity.json").read_text() == before
