"""Numbers, booleans and dates of YAML 1.1 that hardly anyone means: refused, or read as they are meant."""

from __future__ import annotations

from typing import Any

import pytest

from lily.errors import LilyError
from lily.recipes import loader
from lily.tune.space import parse_ranges

HEAD = """name: a
task: text-classification
data: {train: {path: t.csv}, columns: {text: t, label: l}}
"""


def load(folder, text: str, *overrides: str) -> Any:
    model = "" if "model:" in text else "model: {path: x}\n"
    (folder / "recipe.yaml").write_text(f"{HEAD}{text}\n{model}")
    return loader.load_recipe(str(folder / "recipe.yaml"), overrides)


NUMBERS = [
    *(("train.epochs", text) for text in ("yes", "Yes", "on", "off", "true", "FALSE", "1:30", "1:30.5", "010", "08")),
    *(("train.epochs", text) for text in ("1_000", "0x10", "0b11", "0o17", "01.5", ".nan", "nan", "2024-01-01")),
    *(("train.epochs", text) for text in ("'010'", "'1_000'", "!!int 010", "!!float yes", "!!bool yes")),
    *(("lily.r", text) for text in ("true", "010", "1_0", "yes", "1:30", "'010'", "+010", "-0_1")),
    *(("lora.r", text) for text in ("true", "010", "on")),
    *(("lily.params", text) for text in ("true", "010")),
    *(("lily.groups", text) for text in ("{q: {r: true}}", "{q: {num_B: 010}}", "{q: {scaling: yes}}")),
    *(("lily.slices", text) for text in ("{qkv: {v: [false, 10]}}", "{qkv: {v: [0, 010]}}")),
    *(("train.evaluate_every", text) for text in ("true", "010")),
    *(("train.warmup", text) for text in ("no", "1:00")),
    ("train.learning_rate", "1_0e-3"),
    ("seed", "true"),
    ("seed", "0_0"),
    ("peft", "{peft_type: VERA, projection_prng_key: 010}"),
    ("peft", "{peft_type: VERA, vera_dropout: 1e-1}"),
    ("peft", "{peft_type: VERA, save_projection: no}"),
    ("model", "{path: x, architecture: {model_type: bert, num_hidden_layers: 010}}"),
    ("model", "{path: x, architecture: {model_type: bert, is_decoder: off}}"),
]


@pytest.mark.parametrize(("key", "text"), NUMBERS)
def test_a_number_that_can_be_misread_is_refused_with_its_line(tmp_path, key, text):
    *sections, last = key.split(".")
    block = "".join(f"{'  ' * i}{name}:\n" for i, name in enumerate(sections)) + f"{'  ' * len(sections)}{last}: {text}"
    with pytest.raises(LilyError, match=rf"recipe\.yaml:{4 + block.count(chr(10))}: {key}"):
        load(tmp_path, block)
    with pytest.raises(LilyError, match=rf"override ['\"]{key}="):
        load(tmp_path, "", f"{key}={text}")


@pytest.mark.parametrize("override", ["data.max_length=on", "data.split.seed=00", "data.split.test=0_0"])
def test_numbers_of_the_data_too(tmp_path, override):
    with pytest.raises(LilyError, match=f"override '{override}'"):
        load(tmp_path, "", override)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.deduplicate=true", "data.deduplicate", True),
        ("data.deduplicate=yes", "data.deduplicate", True),
        ("data.deduplicate=on", "data.deduplicate", True),
        ("data.deduplicate=False", "data.deduplicate", False),
        ("data.deduplicate=no", "data.deduplicate", False),
        ("data.classes=[yes, no]", "data.classes", ["yes", "no"]),
        ("data.classes=[2024-01-01, 010]", "data.classes", ["2024-01-01", "010"]),
        ("name=2024_01_01", "name", "2024_01_01"),
        ("train.epochs=3", "train.epochs", 3.0),
        ("train.epochs='3'", "train.epochs", 3.0),
        ("train.learning_rate=5e-3", "train.learning_rate", 5e-3),
        ("train.learning_rate=.5e-3", "train.learning_rate", 5e-4),
        ("train.learning_rate=1.0e-3", "train.learning_rate", 1e-3),
        ("lily.r=8.0", "lily.r", 8),
        ("lily.params=1_000_000", "lily.params", "1_000_000"),
        ("lora.r=equal", "lora.r", "equal"),
        ("peft={peft_type: VERA, save_projection: false}", "peft.save_projection", False),
    ],
)
def test_a_value_is_what_it_says(tmp_path, override, key, value):
    got = load(tmp_path, "", override)
    for part in key.split("."):
        got = getattr(got, part)
    assert got == value
    assert isinstance(value, bool) == isinstance(got, bool)


def test_a_described_model_may_have_versions_and_names(tmp_path):
    model = (
        "model: {hub: a/b, architecture: {model_type: bert, transformers_version: 5.23.0, tag: 2024-01-01, c: 0abc}}"
    )
    assert load(tmp_path, model).model.architecture["transformers_version"] == "5.23.0"


@pytest.mark.parametrize("text", ["1.10", "true", "1234567"])
def test_text_that_yaml_takes_for_something_else_is_to_be_quoted(tmp_path, text):
    with pytest.raises(LilyError, match=r"model\.revision: .*in quotes"):
        load(tmp_path, "", "model={hub: a/b}", f"model.revision={text}")
    assert load(tmp_path, f"model: {{hub: a/b, revision: '{text}'}}").model.revision == text


@pytest.mark.parametrize("bounds", ["010:1", "0.1:1_0", "nan:1", "yes:1", "0.1:"])
def test_a_range_has_plain_numbers_too(bounds):
    assert parse_ranges(["scaling=0.1:10"]) == {"scaling": (0.1, 10.0)}
    with pytest.raises(LilyError, match="expected a knob and two numbers"):
        parse_ranges([f"scaling={bounds}"])


def test_half_a_surrogate_pair_in_a_recipe_is_refused_with_its_line(tmp_path):
    with pytest.raises(LilyError, match=r"recipe\.yaml:4: description: holds half of a surrogate pair"):
        load(tmp_path, 'description: "cut \\ud83d"')
