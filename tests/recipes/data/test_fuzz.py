"""Whatever a recipe or a table holds: what it says, or one clear error, without delay."""

from __future__ import annotations

import contextlib
import gzip
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import tally
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lily import LilyError
from lily.recipes import loader
from lily.recipes.data import tables
from lily.recipes.results.result import output_folder
from lily.recipes.spec.schema import Recipe

MINIMAL = {
    "name": "x",
    "task": "text-classification",
    "model": {"path": "model"},
    "data": {"train": {"path": "x.csv"}, "columns": {"text": "t", "label": "l"}},
}

KEYS = sorted({*Recipe.model_fields, *(key for name in ("model", "data", "lily", "lora", "train", "generation")
                                        for key in Recipe.model_fields[name].annotation.model_fields)})  # fmt: skip

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**40), max_value=10**40),
    st.floats(),
    st.text(max_size=12),
    st.binary(max_size=6),
    st.dates(),
    st.datetimes(),
    st.sampled_from(["sft", "lily", "all-linear", "1M", "9" * 5000 + "M", "1e400M", "equal", "../x", "{seed!r}", "~"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=6)), inner, max_size=4),
    ),
    max_leaves=12,
)

# Pieces of YAML that mean something to its parser: anchors, aliases, merges, tags, blocks, flows, documents.
PIECES = st.sampled_from(
    ["name: x\n", "task: sft\n", "lily:\n", "  r: 4\n", "- ", "  - a\n", "&a ", "*a", "<<: *a\n", "!!set ",
     "!!python/name:os.system ", "!!binary ", "!!timestamp ", "!x ", "? ", ": ", "{", "}", "[", "]", ",", "|\n",
     ">-\n", "---\n", "...\n",
     "%YAML 1.1\n", "# c\n", "'", '"', "\\x00", "\t", "\n", "\u2028", "\ufeff", "extends: x\n", "0x_", "1:2:3",
     "~", "=", "y: &y [*y]\n"]
)  # fmt: skip


def loaded(path: Path, overrides: list[str]) -> Recipe | None:
    """The recipe; None for an error, which must be one that is meant for the user."""
    try:
        recipe = loader.load_recipe(str(path), overrides)
    except LilyError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert 0 < len(message) < 20_000
        tally("inputs rejected")
        return None
    output_folder(recipe)
    assert yaml.safe_load(loader.dump_recipe(recipe))["name"] == recipe.name
    return recipe


def examples(fast: int, slow: int) -> list[Any]:
    return [fast, pytest.param(slow, marks=pytest.mark.slow)]


def check(count: int, strategy: Any, prove: Any) -> None:
    settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)(
        given(strategy)(prove)
    )()


@pytest.mark.parametrize("count", examples(200, 5000))
def test_any_bytes_are_a_recipe_or_one_error(tmp_path, count):
    path = tmp_path / "r.yaml"

    def prove(content: bytes) -> None:
        path.write_bytes(content)
        loaded(path, [])

    check(
        count,
        st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace"))),
        prove,
    )


@pytest.mark.parametrize("count", examples(300, 10_000))
def test_any_yaml_is_a_recipe_or_one_error(tmp_path, count):
    path, minimal = tmp_path / "r.yaml", yaml.safe_dump(MINIMAL)

    def prove(drawn: tuple[list[str], bool]) -> None:
        pieces, on_top = drawn
        path.write_text((minimal if on_top else "") + "".join(pieces))
        loaded(path, [])

    check(count, st.tuples(st.lists(PIECES, max_size=25), st.booleans()), prove)


@pytest.mark.parametrize("count", examples(80, 5000))
def test_any_values_are_a_recipe_or_one_error(tmp_path, count):
    path = tmp_path / "r.yaml"

    def prove(values: dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump({**MINIMAL, **values}))
        loaded(path, [])

    check(count, st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6), prove)


@pytest.mark.parametrize("count", examples(200, 5000))
def test_any_overrides_make_a_recipe_or_one_error(tmp_path, count):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    dotted = st.lists(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), max_size=4).map(".".join)
    texts = st.one_of(
        VALUES.map(lambda v: yaml.safe_dump(v).strip()), st.lists(PIECES, max_size=8).map("".join), st.text()
    )
    one = st.one_of(st.tuples(dotted, texts).map("=".join), st.text(max_size=20))

    def prove(overrides: list[str]) -> None:
        loaded(path, overrides)

    check(count, st.lists(one, max_size=3), prove)


@pytest.mark.parametrize("kind", ["timestamp", "int", "float", "bool", "null", "binary", "str", "merge", "value"])
@pytest.mark.parametrize("value", ["", "x", "'1'", "-", "0b", "2020-01-01T99:99:99Z"])
def test_a_tagged_value_is_what_its_tag_says_or_one_error(tmp_path, kind, value):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + f"description: !!{kind} {value}\n")
    loaded(path, [])
    loaded(path, [f"seed=!!{kind} {value}"])


def test_anchors_are_read_and_bombs_of_them_are_not(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "metrics: &m [accuracy, f1]\nbaselines: []\n")
    assert loaded(path, []) is not None
    path.write_text(yaml.safe_dump({**MINIMAL, "metrics": []}) + "exclude: &e [a, b]\ntargets: *e\n")
    found = loaded(path, [])
    assert found is not None
    assert found.targets == ["a", "b"]
    wide = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(60))
    keys = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{b: *a{i}, c: *a{i}}}\n" for i in range(60))
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1}\n  <<: [*a{i}, *a{i}, *a{i}]\n" for i in range(60))
    for bomb in (wide, keys, merges, "a: &a [*a]\n", "a: &a {b: *a}\n"):
        path.write_text(bomb + yaml.safe_dump(MINIMAL))
        assert loaded(path, []) is None


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "csv.gz", "json.gz", "jsonl.gz"])
@pytest.mark.parametrize("count", examples(60, 1500))
def test_any_bytes_are_a_table_or_one_error(tmp_path, kind, count):
    path = tmp_path / f"x.{kind}"

    def prove(drawn: tuple[bytes, bool, int]) -> None:
        content, packed, cut = drawn
        content = gzip.compress(content)[: max(1, 200 - cut)] if packed else content
        path.write_bytes(b"PAR1" + content + b"PAR1" if kind == "parquet" else content)
        with contextlib.suppress(LilyError):
            assert all(isinstance(row, dict) for row in tables.stream_rows(path))

    pieces = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\n",
        b"a",
        b"1",
        b"\r",
        b"\t",
        b"\\",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
    ]
    content = st.one_of(st.binary(max_size=80), st.lists(st.sampled_from(pieces), max_size=40).map(b"".join))
    check(count, st.tuples(content, st.booleans() if "gz" in kind else st.just(False), st.integers(0, 199)), prove)
