"""Runs, searches and comparisons that an earlier version began go on with its defaults."""

from __future__ import annotations

import json

import pytest
import yaml
from recipes_helpers import classification, rows, write_jsonl, write_recipe

from lily.errors import LilyError
from lily.recipes import loader, preflight
from lily.recipes.begun import as_begun


@pytest.fixture
def recipe(tmp_path, encoder):
    def make(**lily):
        values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", rows()), tmp_path)
        values["lily"] = {"r": 4, "num_A": 1, "num_B": 2, **lily}
        return loader.load_recipe(write_recipe(tmp_path, values))

    return make


def dumped(recipe, **changes):
    """A complete recipe as an earlier version kept it: without the key `distinct`, with its default scale."""
    values = yaml.safe_load(loader.dump_recipe(recipe))
    del values["lily"]["distinct"]
    values["lily"] |= {"scaling": 1.0, **changes}
    return values


def test_what_a_new_run_begins_with_is_not_changed(recipe, tmp_path):
    made = recipe()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(loader.dump_recipe(made))
    assert as_begun(made, tmp_path / "run") == as_begun(made, tmp_path / "missing") == made


def test_open_keys_of_a_run_are_what_they_were(recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(dumped(recipe())))
    lily = as_begun(recipe(), run).lily
    assert (lily.distinct, lily.scaling) == ("none", 1.0)
    given = as_begun(recipe(distinct="signs", scaling=2.0), run).lily
    assert (given.distinct, given.scaling) == ("signs", 2.0)


def test_a_search_and_a_comparison_go_on_with_the_default_scale_whatever_their_trials_had(recipe, tmp_path):
    search, comparison = tmp_path / "search", tmp_path / "comparison"
    search.mkdir()
    (search / "settings.json").write_text(json.dumps({"recipe": dumped(recipe())}))
    lily = as_begun(recipe(), search).lily
    assert (lily.distinct, lily.scaling) == ("none", 1.0)
    (comparison / "runs" / "lily" / "0").mkdir(parents=True)
    (comparison / "runs" / "lily" / "0" / "recipe.yaml").write_text(yaml.safe_dump(dumped(recipe(), scaling=6.0)))
    lily = as_begun(recipe(), comparison).lily
    assert (lily.distinct, lily.scaling) == ("none", 1.0)


def test_a_small_budget_buys_what_it_bought(recipe, tmp_path):
    shape = dict.fromkeys(("r", "num_A", "num_B"))
    run = tmp_path / "run"
    run.mkdir()
    kept = dumped(recipe(params=3000, **shape))
    del kept["lily"]["fewest"]  # an earlier version has no such key
    (run / "recipe.yaml").write_text(yaml.safe_dump(kept))
    other = as_begun(recipe(params=3000, fewest=1, **shape), run)
    with pytest.raises(LilyError, match="fewest"):
        preflight.check_folder(other, run, True, False)
    begun = as_begun(recipe(params=3000, **shape), run)
    assert begun.lily.fewest == 2
    preflight.check_folder(begun, run, True, False)
    assert as_begun(recipe(), run).lily.fewest is None


@pytest.mark.parametrize("text", ["", "name: [", "lily: 3", "\0"])
def test_a_damaged_recipe_is_left_to_whoever_reads_it(recipe, tmp_path, text):
    made = recipe()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    assert as_begun(made, tmp_path / "run") == made


@pytest.mark.parametrize("change", [{"scaling": 3.0}, {"distinct": "signs"}])
def test_a_key_that_a_run_had_set_and_the_recipe_drops_is_no_default(recipe, tmp_path, change):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(dumped(recipe(), **change)))
    with pytest.raises(LilyError, match=next(iter(change))):
        preflight.check_folder(as_begun(recipe(), run), run, True, False)
