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
from lily.recipes.spec.base import Section
from lily.recipes.spec.schema import Recipe

MINIMAL = {
    "name": "a",
    "task": "text-classification",
    "model": {"hub": "some/model"},
    "data": {"train": {"path": "x.csv"}, "columns": {"text": "t", "label": "l"}},
}


@pytest.mark.parametrize("name", [name for file in loader.shipped() for name in loader.names_of(file)])
def test_every_recipe_that_ships_is_valid_described_and_round_trips(name, tmp_path):
    recipe = loader.load_any(name)
    assert recipe.name == name.rpartition("/")[2].replace(":", "-")
    assert recipe.description
    for complete in (True, False):
        (tmp_path / "again.yaml").write_text(loader.dump_recipe(recipe, complete=complete))
        assert loader.load_any(str(tmp_path / "again.yaml")) == recipe


def written_keys(model):
    """Every key of a section, and of those inside."""
    values = {}
    for name, value in model:
        values[name] = written_keys(value) if isinstance(value, Section) else None
    return values


def keys_of(values):
    return {k: keys_of(v) if isinstance(v, dict) else None for k, v in values.items()}


def test_the_effective_recipe_holds_every_value_so_that_new_defaults_do_not_change_it(tmp_path):
    recipe = loader.load_recipe(write_recipe(tmp_path, MINIMAL))
    text = loader.dump_recipe(recipe)
    assert keys_of(yaml.safe_load(text)) == written_keys(recipe)
    assert yaml.safe_load(text)["train"]["learning_rate"] == recipe.train.learning_rate


def test_a_value_written_down_is_kept_though_it_is_the_default(tmp_path):
    recipe = loader.load_recipe(write_recipe(tmp_path, {**MINIMAL, "method": "lily", "train": {"epochs": 3.0}}))
    assert yaml.safe_load(loader.dump_recipe(recipe, complete=False)) == {
        **MINIMAL,
        "method": "lily",
        "train": {"epochs": 3.0},
    }


def test_a_template_is_not_a_recipe_that_ships():
    assert not any(name.rpartition("/")[2].startswith("_") for name in loader.shipped())


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


@settings(max_examples=50, deadline=None)
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


def test_a_file_may_be_named_as_the_shipped_recipe_that_it_extends(tmp_path):
    assert loader.load_recipe(write_recipe(tmp_path, {"extends": "quickstart", "name": "mine"}, "quickstart.yaml"))


def test_an_override_reaches_into_a_section_left_empty(tmp_path):
    assert loader.load_recipe(write_recipe(tmp_path, {**MINIMAL, "lily": None}), ["lily.r=4"]).lily.r == 4


def test_another_source_takes_the_place_of_the_inherited_one(tmp_path):
    before, rows = loader.load_recipe("quickstart"), str(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text("{}")
    for recipe in (
        loader.load_recipe("quickstart", ["model.hub=some/model", f"data.train.path={rows}"]),
        loader.load_recipe(
            write_recipe(
                tmp_path,
                {"extends": "quickstart", "model": {"hub": "some/model"}, "data": {"train": {"path": rows}}},
            )
        ),
    ):
        assert (recipe.model.hub, recipe.model.package) == ("some/model", None)
        assert (recipe.data.train.path, recipe.data.train.package) == (rows, None)
        assert recipe.data.columns == before.data.columns
    assert before.model.package is not None


SHAPES = [
    (["lily.params=50M"], {"params": "50M"}),
    (["lily.params=50M", "lily.fewest=1"], {"params": "50M", "fewest": 1}),
    (["lily.stride_A=2"], {"r": 48, "stride_A": 2, "num_B": 1}),
    (["lily.params=null"], {"r": 48, "num_A": 1, "num_B": 1}),
]


@pytest.mark.parametrize(("overrides", "shape"), SHAPES)
@pytest.mark.parametrize("written", [False, True])
def test_a_budget_takes_the_place_of_an_inherited_shape(tmp_path, overrides, shape, written):
    values = yaml.safe_load("{" + ", ".join(text.removeprefix("lily.").replace("=", ": ") for text in overrides) + "}")
    child = write_recipe(tmp_path, {"extends": "quickstart", "lily": values}, "child.yaml")
    recipe = loader.load_recipe(child) if written else loader.load_recipe("quickstart", overrides)
    names = ("params", "fewest", "r", "num_A", "stride_A", "num_B")
    assert {name: value for name in names if (value := getattr(recipe.lily, name)) is not None} == shape


def test_a_shape_takes_the_place_of_an_inherited_budget_and_a_budget_that_of_groups(tmp_path):
    write_recipe(tmp_path, {**MINIMAL, "lily": {"params": "1M", "fewest": 1}}, "budget.yaml")
    assert loader.load_recipe(str(tmp_path / "budget.yaml"), ["lily.r=4"]).lily.params is None
    groups = {"mlp": {"r": 4, "activation": "relu"}}
    path = write_recipe(tmp_path, {**MINIMAL, "lily": {"r": 2, "groups": groups}})
    lily = loader.load_recipe(path, ["lily.params=1M"]).lily
    assert (lily.groups["mlp"].r, lily.groups["mlp"].activation) == (None, "relu")


def test_what_one_command_line_contradicts_is_an_error(tmp_path):
    for overrides in (["lily.params=1M", "lily.r=4"], ["lily.r=4", "lily.params=1M"]):
        with pytest.raises(LilyError, match="give either params or those"):
            loader.load_recipe("quickstart", overrides)
    with pytest.raises(LilyError, match="says the same as num_A"):
        loader.load_recipe("quickstart", ["lily.num_A=1", "lily.stride_A=2"])


def test_a_misspelt_file_is_looked_for_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("reviews.yaml", "in/talks.yml"):
        write_recipe(tmp_path, MINIMAL, name)
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    write_recipe(tmp_path, {"extends": "reveiws"}, "child.yaml")
    for name, said in {
        "reveiws.yaml": "did you mean reviews.yaml?",
        "reviews": "did you mean reviews.yaml?",
        "reviews.yml": "did you mean reviews.yaml?",
        "in/talk.yaml": "did you mean in/talks.yml?",
        "quickstrat.yaml": "did you mean quickstart",
        "in": "in is a folder; name one of its recipes: in/talks.yml",
        "rows.csv": "rows.csv is data, not a recipe; `lily new rows.csv` writes a recipe for it",
        "child.yaml": "no recipe 'reveiws': neither a file nor a shipped recipe; did you mean reviews.yaml?",
    }.items():
        with pytest.raises(LilyError) as caught:
            loader.load_any(name)
        assert said in str(caught.value)


def test_the_origin_of_each_key_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, {"extends": "base/encoder", "train": {"epochs": 7}}, "middle.yaml")
    values = {key: value for key, value in MINIMAL.items() if key != "task"}
    path = write_recipe(tmp_path, {"extends": "middle.yaml", **values}, "mine.yaml")
    origins = loader.origins(loader.load_recipe(path, ["train.batch_size=4"]))
    keys = {("name",): "mine.yaml:2", ("train", "epochs"): "middle.yaml", ("train", "learning_rate"): "base/encoder",
            ("task",): "_encoder", ("train", "batch_size"): "command line"}  # fmt: skip
    assert {key: origins[key] for key in keys} == keys
    assert ("train", "schedule") not in origins


def test_a_part_of_the_inherited_source_can_be_changed(tmp_path):
    package = loader.load_recipe("quickstart", ["model.package.version=9.9.0"]).model.package
    assert package == loader.load_recipe("quickstart").model.package.model_copy(update={"version": "9.9.0"})
    switched = loader.load_recipe("chat", [f"model.path={tmp_path}"]).model
    assert (switched.path, switched.format) == (str(tmp_path), "transformers")


def test_a_wrong_value_is_shown_in_short(tmp_path):
    with pytest.raises(LilyError) as caught:
        loader.load_recipe(write_recipe(tmp_path, {**MINIMAL, "seed": "x" * 3000}))
    assert "seed: expected a whole number" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_error_of_a_section_names_what_the_command_line_changed_in_it(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("extends: quickstart\nlily: {r: 8}\n")
    with pytest.raises(LilyError, match=r"x\.yaml:2 with override 'lily\.r=4' and override 'lily\.params=1M': lily: "):
        loader.load_recipe(str(path), ["lily.r=4", "lily.params=1M"])
