"""The search itself, on trainings that take no time."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest
import yaml
from helpers import tally
from recipes_helpers import classification, write_recipe
from rich.console import Console
from safetensors import SafetensorError
from searching import LEARNING_RATE, SCALING, TOO_MUCH, FakeTraining, quality

from lily.errors import LilyError
from lily.recipes import loader, train
from lily.search import folder
from lily.tune.report import print_tuned
from lily.tune.run import WRITTEN, TuneOptions, best_trial, ranked_trials, tune
from lily.tune.study import JOURNAL, TrialResult

pytestmark = pytest.mark.sample(every=10)

TRIALS = 24


@pytest.fixture
def source(tmp_path, encoder, table):
    return write_recipe(tmp_path, classification(encoder, table, tmp_path))


@pytest.fixture
def search(source, tmp_path, monkeypatch):
    def run(training=None, name="search", overrides=(), wish=None, **how):
        monkeypatch.setattr(train, "train", training or FakeTraining())
        monkeypatch.setattr("gc.collect", lambda: 0)  # a second, after trials that take none
        recipe = loader.load_recipe(source, overrides)
        return tune(
            recipe, tmp_path / name, wish or TuneOptions(trials=TRIALS), source=source, overrides=overrides, **how
        )

    return run


def plain(tried):
    return [(t.number, t.state, t.values, t.value, t.steps) for t in tried]


@pytest.fixture(scope="module")
def undisturbed():
    """What a search that nobody disturbs tries, once it has been made."""
    return []


def test_a_search_begins_with_the_recipe_and_comes_near_the_best(search, undisturbed):
    training = FakeTraining()
    found = search(training)
    undisturbed += plain(found.trials)
    assert [t.number for t in found.trials] == list(range(TRIALS))
    assert found.trials[0].values == found.space.start
    assert quality(training.recipes[0]) < 0.6 < 0.9 < found.best.value
    assert found.best == best_trial(found.trials, "accuracy")
    assert found.best.values["learning_rate"] == pytest.approx(LEARNING_RATE, rel=1)
    assert found.best.values["scaling"] == pytest.approx(SCALING, rel=2)
    assert found.importance.keys() == {"learning_rate", "scaling", "shape"}
    assert sum(found.importance.values()) == pytest.approx(1)
    assert found.importance["shape"] < 0.5  # it changes nothing here


def test_trials_see_validation_rows_alone_and_train_no_baselines(search):
    training = FakeTraining()
    search(training, overrides=["baselines=[lora]"], wish=TuneOptions(trials=2))
    assert all(flags["validation_only"] for flags in training.flags)
    assert all(recipe.baselines == [] for recipe in training.recipes)


def test_a_trial_that_is_worse_than_the_median_is_stopped_and_one_that_diverges_is_survived(search):
    found = search()
    states = {t.state for t in found.trials}
    assert states == {"complete", "stopped", "diverged"}
    for t in found.trials:
        assert (t.steps < 40) == (t.state != "complete")
        assert (t.values["learning_rate"] > TOO_MUCH) == (t.state == "diverged")
    assert found.best.state == "complete"


def test_a_trial_that_fails_is_told_and_the_search_goes_on(search, tmp_path):
    def ending(run, evaluation):
        if run == 1 and evaluation == 2:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")
        if run == 2:
            raise LilyError("no such shape [v2]")

    said = []
    found = search(FakeTraining(ending=ending), wish=TuneOptions(trials=4), announce=said.append)
    reasons = ["RuntimeError: CUDA out of memory.", "no such shape [v2]"]
    assert [(t.state, t.reason) for t in found.trials[1:3]] == [("failed", reason) for reason in reasons]
    assert found.trials[3].state != "failed"
    assert [line for line in said if "failed" in line] == [f"  failed: {reason}" for reason in reasons]
    kept = json.loads((tmp_path / "search" / "tune.json").read_text())
    assert [t["reason"] for t in kept["trials"]] == ["", *reasons, ""]
    assert not (tmp_path / "search" / "trials" / "001" / "checkpoints").exists()
    console = Console(record=True, width=200)
    print_tuned(found, tmp_path, console)
    text = console.export_text()
    assert all(f"failed: {reason}" in text for reason in reasons)
    assert "2 trials failed" in text
    again = FakeTraining()
    search(again, wish=TuneOptions(trials=5))
    assert [train.output_folder(r).name for r in again.recipes] == ["004"]
    tally("faults survived", 2)


def test_trials_that_fail_one_after_the_other_end_the_search_and_the_same_command_goes_on(search):
    def ending(run, evaluation):
        if run != 2:
            raise LilyError(f"the disk is gone, {run}")

    training = FakeTraining(ending=ending)
    with pytest.raises(LilyError, match="3 trials in a row failed, the last one because: the disk is gone, 5"):
        search(training, wish=TuneOptions(trials=9))
    assert len(training.recipes) == 6
    found = search(wish=TuneOptions(trials=7))
    assert [t.state == "failed" for t in found.trials] == [True, True, False, True, True, True, False]


@pytest.mark.parametrize(
    "refused", [OSError(errno.ENOSPC, "No space left on device", "x"), SafetensorError("IoError (os error 28)")]
)
def test_a_full_disk_is_no_fault_of_the_trial_which_goes_on_later(search, refused):
    def ending(run, evaluation):
        raise refused

    with pytest.raises(type(refused)):
        search(FakeTraining(ending=ending), wish=TuneOptions(trials=1))
    again = FakeTraining()
    search(again, wish=TuneOptions(trials=1))
    assert again.flags[0]["resume"]


@pytest.mark.parametrize("at", [(0, 1), (7, 4), (23, 2)], ids=str)
def test_a_search_that_is_killed_and_started_again_tries_the_same(search, undisturbed, at, tmp_path):
    if not undisturbed:
        undisturbed += plain(search(name="undisturbed").trials)

    def kill(run, evaluation):
        if (run, evaluation) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(FakeTraining(ending=kill))
    with (tmp_path / "search" / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code":4,"wor')  # half a line
    (tmp_path / "search" / f"{JOURNAL}.lock").symlink_to("/nowhere")
    again = FakeTraining()
    assert plain(search(again).trials) == undisturbed
    assert again.flags[0]["resume"]
    tally("faults survived")


def test_a_finished_search_trains_nothing_and_goes_on_with_more_trials(search):
    first = search(wish=TuneOptions(trials=3))
    training = FakeTraining()
    assert plain(search(training, wish=TuneOptions(trials=3)).trials) == plain(first.trials)
    assert training.recipes == []
    more = search(training, wish=TuneOptions(trials=5))
    assert len(training.recipes) == 2
    assert plain(more.trials[:3]) == plain(first.trials)


def test_when_time_is_up_no_new_trial_begins(search):
    training, said = FakeTraining(), []
    found = search(training, wish=TuneOptions(trials=5, timeout=-1), announce=said.append)
    assert training.recipes == []
    assert found.best is None
    assert "time is up after 0 trials" in said[-1]


def test_the_best_recipe_is_what_its_trial_trained(search, tmp_path):
    training = FakeTraining()
    found = search(training, overrides=["train.epochs=1", "train.weight_decay=0.5"])
    best = loader.load_recipe(str(found.recipe))
    tried = next(r for r in training.recipes if train.output_folder(r).name == f"{found.best.number:03d}")
    apart = {"name": "", "description": "", "output": ""}
    assert best.model_copy(update=apart) == tried.model_copy(update=apart)
    assert best.name == "tiny-tuned"
    assert best.train.evaluate_every == 1  # an epoch alone is not often enough to stop a trial
    assert best.train.weight_decay == 0.5
    assert yaml.safe_load(found.recipe.read_text())["extends"] == str(tmp_path / "recipe.yaml")
    assert json.loads((tmp_path / "search" / "tune.json").read_text())["best"]["value"] == found.best.value


def test_without_a_file_to_extend_the_best_recipe_is_written_out(source, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", FakeTraining())
    recipe = loader.load_recipe(source)
    found = tune(recipe, tmp_path / "search", TuneOptions(trials=1))
    best = loader.load_recipe(str(found.recipe))
    assert "extends" not in found.recipe.read_text()
    assert best.data == recipe.data
    assert best.lily.r == recipe.lily.r


def test_loras_search_writes_loras_recipe(search):
    found = search(overrides=["method=lora"], wish=TuneOptions(trials=3))
    best = loader.load_recipe(str(found.recipe))
    assert best.method == "lora"
    assert best.lora.alpha == pytest.approx(found.best.values["alpha"], rel=0.01)
    assert best.lora.learning_rate == pytest.approx(found.best.values["learning_rate"], rel=0.01)


def test_weights_of_trials_are_kept_only_if_asked_for(search, tmp_path):
    search(wish=TuneOptions(trials=1))
    assert sorted(p.name for p in (tmp_path / "search" / "trials" / "000").iterdir()) == ["metrics.json", "recipe.yaml"]
    search(name="kept", wish=TuneOptions(trials=1, keep=True))
    assert (tmp_path / "kept" / "trials" / "000" / "best").is_dir()


def test_a_folder_of_another_search_or_of_something_else_is_left_alone(search, tmp_path):
    search(wish=TuneOptions(trials=1))
    with pytest.raises(LilyError, match=r"begun with other settings: recipe\.seed was 0 and is now 3"):
        search(overrides=["seed=3"])
    with pytest.raises(LilyError, match=r"other settings: space\.ranges\.scaling"):
        search(wish=TuneOptions(trials=1, ranges={"scaling": (1.0, 2.0)}))
    training = FakeTraining()
    search(training, overrides=["seed=3"], wish=TuneOptions(trials=1), overwrite=True)
    assert len(training.recipes) == 1
    (tmp_path / "search" / "thesis.tex").touch()
    for overwrite in (True, False):
        with pytest.raises(LilyError, match=r"holds thesis\.tex, which `lily tune` does not write"):
            search(overwrite=overwrite)
    (tmp_path / "file").touch()
    with pytest.raises(LilyError, match="is a file; name a folder"):
        search(name="file")
    tally("inputs rejected", 5)


def test_two_processes_do_not_search_in_one_folder(search, tmp_path, monkeypatch):
    search(wish=TuneOptions(trials=1))
    monkeypatch.setattr(folder, "PATIENCE", 0)
    with (
        folder.opened(tmp_path / "search", "lily tune", WRITTEN),
        pytest.raises(LilyError, match="another process is using"),
    ):
        search(wish=TuneOptions(trials=2))


@pytest.mark.parametrize("text", ["{}\n", "no journal\n\n", '{"op_code": 99}\n', '{"op_code": 0, "worker_id": "a"}\n'])
def test_a_journal_that_is_none_is_refused(search, tmp_path, text):
    search(wish=TuneOptions(trials=1))
    (tmp_path / "search" / JOURNAL).write_text(text)
    with pytest.raises(LilyError, match="is not the journal of a search"):
        search(wish=TuneOptions(trials=2))
    tally("inputs rejected")


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (TuneOptions(trials=0), "give at least 1"),
        (TuneOptions(max_forgetting=0.1), "needs a recipe that measures forgetting"),
        (TuneOptions(knobs=["rank"]), "'rank' is not a knob of lily"),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(search, tmp_path, wish, message):
    with pytest.raises(LilyError, match=message):
        search(wish=wish)
    assert not (tmp_path / "search").exists()


def test_a_recipe_that_cannot_run_is_refused_before_anything_is_written(search, tmp_path):
    with pytest.raises(LilyError, match="no column 'texts'"):
        search(overrides=["data.columns.text=texts"])
    assert not (tmp_path / "search").exists()


def test_the_best_is_the_best_of_those_that_forget_little_enough():
    tried = [
        TrialResult(0, "complete", {}, 0.5, forgetting=0.01),
        TrialResult(1, "complete", {}, 0.9, forgetting=0.30),
        TrialResult(2, "complete", {}, 0.7, forgetting=0.10),
        TrialResult(3, "stopped", {}, 0.99, forgetting=0.0),
        TrialResult(4, "complete", {}, 0.7, forgetting=0.05),
        TrialResult(5, "diverged", {}),
    ]
    assert [t.number for t in ranked_trials(tried, "accuracy")] == [1, 4, 2, 0, 3, 5]
    assert best_trial(tried, "accuracy").number == 1
    assert best_trial(tried, "accuracy", 0.1).number == 4
    assert best_trial(tried, "accuracy", 0.001) is None
    assert best_trial(tried, "loss").number == 0
    assert best_trial([replace(t, forgetting=None) for t in tried], "accuracy", 1.0) is None
