"""Reading recipes: inheritance, overrides, and that everything that ships is valid."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes_helpers import write_recipe

from lily.errors import LilyError
from lily.recipes import loader
from lily.recipes.schema import Recipe

MINIMAL = {
    "name": "a",
    "task": "text-classification",
    "model": {"hub": "some/model"},
    "data": {"train": {"path": "x.csv"}, "columns": {"text": "t", "label": "l"}},
}


@pytest.mark.parametrize("name", loader.shipped())
def test_every_recipe_that_ships_is_valid_described_and_round_trips(name, tmp_path):
    recipe = loader.load_recipe(name)
    assert recipe.name == name
    assert loader.describe(loader.shipped()[name])
    (tmp_path / "again.yaml").write_text(loader.dump_recipe(recipe))
    assert loader.load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_a_template_is_not_a_recipe_that_ships():
    assert not any(name.startswith("_") for name in loader.shipped())


def test_a_child_overrides_its_parent_key_by_key(tmp_path):
    write_recipe(tmp_path, {**MINIMAL, "train": {"epochs": 5, "batch_size": 4}, "metrics": ["f1"]}, "parent.yaml")
    child = write_recipe(tmp_path, {"extends": "parent", "train": {"epochs": 1}, "metrics": ["accuracy"]}, "child.yaml")
    recipe = loader.load_recipe(child)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.metrics) == (1, 4, ["accuracy"])


def test_overrides_are_yaml_and_reach_any_depth(tmp_path):
    path = write_recipe(tmp_path, MINIMAL)
    recipe = loader.load_recipe(
        path, ["train.learning_rate=1e-4", "method=lora", "targets=[q, v]", "data.split.seed=7", "lora.r=3"]
    )
    assert recipe.train.learning_rate == 1e-4
    assert (recipe.method, recipe.targets, recipe.data.split.seed, recipe.lora.r) == ("lora", ["q", "v"], 7, 3)


def test_the_schema_is_json_and_names_every_key():
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert all("description" in field for field in schema["$defs"]["Package"]["properties"].values())


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "extra", ""]), VALUES, max_size=8))
def test_any_mapping_is_either_a_recipe_or_one_clear_error(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **values}))
    try:
        recipe = loader.load_recipe(str(path))
    except LilyError as error:
        message = str(error)
    else:
        message = recipe.name
    assert message
