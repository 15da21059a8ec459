"""One file, many recipes: what a variant is, and that every mistake about one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipes_helpers import classification, write_recipe
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import loader

TEMPLATE = {
    "name": "many",
    "description": "On {variant}.",
    "task": "text-classification",
    "model": {"hub": "some/model"},
    "data": {"train": {"path": "sets/{variant}/train.csv"}, "columns": {"text": "t", "label": "l"}},
    "metrics": ["accuracy"],
    "variants": {
        "cats": None,
        "dogs": {"lily": {"scaling": 2.0}, "metrics": ["f1"], "data": {"train": {"hub": "a/{variant}"}}},
        "birds": {"name": "eagles", "train": {"epochs": 7}},
    },
}


@pytest.fixture
def many(tmp_path: Path) -> str:
    return write_recipe(tmp_path, TEMPLATE, "many.yaml")


def test_a_variants_keys_are_put_over_the_files_and_its_name_into_the_files_strings(many):
    cats, dogs, birds = (loader.load_recipe(f"{many}:{name}") for name in ("cats", "dogs", "birds"))
    assert [r.name for r in (cats, dogs, birds)] == ["many-cats", "many-dogs", "eagles"]
    assert (cats.description, cats.data.train.path, cats.lily.scaling) == ("On cats.", "sets/cats/train.csv", None)
    assert (dogs.data.train.hub, dogs.data.train.path, dogs.metrics, dogs.lily.scaling) == ("a/dogs", None, ["f1"], 2.0)
    assert (birds.train.epochs, cats.train.epochs) == (7, 3)
    assert loader.load_recipe(f"{many}:birds", ["train.epochs=1"]).train.epochs == 1


def test_the_effective_recipe_of_a_variant_is_a_recipe_of_its_own(many, tmp_path):
    recipe = loader.load_recipe(f"{many}:dogs")
    (tmp_path / "again.yaml").write_text(loader.dump_recipe(recipe))
    assert loader.load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_a_file_may_extend_a_file_with_variants_or_one_of_them(many, tmp_path):
    own = {"train": {"epochs": 9}, "variants": {"dogs": {"lily": {"scaling": 3.0}}, "fish": {}}}
    child = write_recipe(tmp_path, {"extends": "many", **own}, "child.yaml")
    assert loader.names_of(child) == [f"{child}:{name}" for name in ("cats", "dogs", "birds", "fish")]
    dogs = loader.load_recipe(f"{child}:dogs")
    assert (dogs.metrics, dogs.lily.scaling, dogs.train.epochs) == (["f1"], 3.0, 9)
    assert loader.load_recipe(f"{child}:birds").train.epochs == 7  # what is one variant's own wins
    for parent in ("many:dogs", "many.yaml:dogs", f"{many}:dogs"):
        one = write_recipe(tmp_path, {"extends": parent, "train": {"epochs": 9}}, "one.yaml")
        assert (loader.load_recipe(one).name, loader.load_recipe(one).train.epochs) == ("many-dogs", 9)
        assert loader.names_of(one) == [one]
    alone = write_recipe(tmp_path, {"extends": "many", "variants": None, "name": "a"}, "alone.yaml")
    assert loader.load_recipe(alone).data.train.path == "sets/{variant}/train.csv"


def test_a_name_for_extends_means_the_same_from_any_folder(many, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loader.from_anywhere("many.yaml:cats") == f"{Path(many).resolve()}:cats"
    assert loader.from_anywhere("many.yaml") == str(Path(many).resolve())
    assert loader.from_anywhere("paper/vtab-vit:cifar") == "paper/vtab-vit:cifar"
    assert loader.from_anywhere("quickstart") == "quickstart"


def test_a_file_whose_name_has_a_colon_is_that_file(tmp_path):
    plain = {key: value for key, value in TEMPLATE.items() if key != "variants"}
    assert loader.load_recipe(write_recipe(tmp_path, plain, "many.yaml:cats")).name == "many"


@pytest.mark.parametrize(
    ("asked", "changes", "says"),
    [
        ("", {}, "many.yaml holds 3 recipes; name one of FILE:NAME with NAME cats, dogs, birds"),
        (":", {}, "many.yaml holds 3 recipes; name one of"),
        (":dog", {}, "many.yaml has no variant 'dog'; did you mean FILE:dogs? There are FILE:NAME"),
        (":x", {"variants": None}, "has no variants, so there is no FILE:x; remove :x"),
        (":x", {"variants": {}}, "FILE:{line}: variants: expected names with the keys"),
        (":x", {"variants": ["x"]}, "FILE:{line}: variants: expected names with the keys in which each differs"),
        (":x", {"variants": {"x": 3}}, "FILE:{line+1}: variants.x: expected the keys in which it differs, got int"),
        (
            ":X",
            {"variants": {"X": {}}},
            "FILE:{line+1}: variants.X: a variant's name must consist of lowercase",
        ),
        (":x", {"variants": {"x": {"extends": "y"}}}, "FILE:{line+2}: variants.x.extends: is a key of the file"),
        (":x", {"variants": {"x": {"epochs": 3}}}, "FILE:{line+2}: epochs: unknown key; did you mean train.epochs?"),
        (":x", {"variants": {"x": {"lily": {"r": 0}}}}, "FILE:{line+3}: lily.r: expected more than 0"),
        (":x", {"variants": {"x": {"metrics": ["mse"]}}}, "FILE:{line+2}: metrics: mse is not a metric of"),
    ],
)
def test_what_is_wrong_with_a_variant_is_told_with_its_line(tmp_path, asked, changes, says):
    path = write_recipe(tmp_path, {**TEMPLATE, **changes}, "many.yaml")
    start = next(n for n, line in enumerate(Path(path).read_text().splitlines(), 1) if line.startswith("variants"))
    for more in range(3, -1, -1):
        says = says.replace(f"{{line+{more}}}", str(start + more))
    with pytest.raises(LilyError) as caught:
        loader.load_recipe(path + asked)
    assert says.replace("{line}", str(start)).replace("FILE", path) in str(caught.value)


def test_the_command_line_lists_prints_copies_and_plans_variants(tmp_path, encoder, table, monkeypatch):
    values = classification(encoder, table, tmp_path, variants={"small": {"lily": {"r": 2}}, "large": {}})
    write_recipe(tmp_path, values, "many.yaml")
    monkeypatch.setattr(loader, "LIBRARY", tmp_path)

    def said(*arguments: str) -> str:
        out = CliRunner().invoke(app, list(arguments))
        assert out.exit_code == 0, out.output
        return out.stdout

    assert "(2 recipes: many:NAME)" in " ".join(said("recipes").split())
    assert said("recipes", "many").split() == ["many:small", "many:large"]
    assert yaml.safe_load(said("recipes", "many:small"))["lily"]["r"] == 2
    for name in ("many", str(tmp_path / "many.yaml")):
        assert json.loads(said("plan", f"{name}:small", "--json"))["plan"]["options"]["r"] == 2
    monkeypatch.chdir(tmp_path)
    said("recipes", "many", "--copy", "mine.yaml")
    assert loader.load_recipe("mine.yaml:large") == loader.load_recipe("many:large")
    said("recipes", "many:small", "--copy", "small.yaml")
    assert loader.load_recipe("small.yaml") == loader.load_recipe("many:small")


VALUES = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=5), st.sampled_from(["{variant}", "x", "extends"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["lily", "r", "name", "x", "path", "hub", "data", "variants"]), inner),
    ),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(VALUES, st.sampled_from(["", ":", ":x", ":path", ":\0", "::"]))
def test_any_variants_are_recipes_or_one_error(tmp_path, values, asked):
    path = write_recipe(tmp_path, {**TEMPLATE, "variants": values}, "many.yaml")
    try:
        message = loader.load_recipe(path + asked).name
    except LilyError as error:
        message = str(error)
    assert message
