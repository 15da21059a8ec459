"""Several training files, and several test sets, each judged by itself."""

from __future__ import annotations

import json

import pytest
from recipes_helpers import classification, rows, sft, write_jsonl, write_recipe
from rich.console import Console

from lily.errors import LilyError
from lily.recipes import data, loader, train
from lily.recipes.results import card as report
from lily.recipes.scoring import test_sets


def table(word, count=30):
    answers = ("no", "yes")
    return [{"question": f"{word} {r['text']}", "answer": answers[int(r["label"])]} for r in rows(count)]


@pytest.fixture
def made(tmp_path, chat_model):
    def make(*overrides):
        files = {
            name: {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", table(word)))}
            for name, word in (("a", "good"), ("b", "bad"), ("c", "fine"))
        }
        values = sft(chat_model, tmp_path / "a.jsonl", tmp_path)
        values["data"] |= {
            "train": files["a"],
            "mix": {"b": files["b"]},
            "tests": {"c": files["c"], "again-a": files["a"]},
        }
        values["data"]["split"] = {"validation": 0.2}
        return loader.load_recipe(write_recipe(tmp_path, values), list(overrides))

    return make


def test_all_training_files_are_trained_on_and_max_test_counts_for_each_test_set(made):
    splits = data.load_splits(made("data.max_test=7"))
    assert len(splits.train) == 48
    assert {row["prompt"].split()[0] for row in splits.train} == {"good", "bad"}
    assert {row["prompt"].split()[0] for row in splits.validation} == {"good", "bad"}
    assert {name: len(found) for name, found in splits.tests.items()} == {"c": 7, "again-a": 7}
    assert {row["prompt"].split()[0] for row in splits.tests["c"]} == {"fine"}


def test_the_mean_counts_each_set_the_same():
    before = test_sets.noted({"x": {"m": 0.25, "loss": 2.0}, "y": {"m": 0.75, "loss": 1.0}}, "before")
    after = test_sets.noted({"x": {"m": 0.5}, "y": {"m": 1.0}}, "final", before)
    assert after["x"] == {"before": {"m": 0.25, "loss": 2.0}, "final": {"m": 0.5}}
    assert after["mean"] == {"before": {"m": 0.5, "loss": 1.5}, "final": {"m": 0.75}}
    assert test_sets.noted({}, "before") == {}


@pytest.mark.parametrize("method", ["lily", "none"])
def test_each_test_set_is_judged_before_and_after_and_told(made, tmp_path, method):
    recipe = made("data.max_test=8", f"method={method}", "train.epochs=2")
    result = train.train(recipe, quiet=True)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["tests"] == result.tests
    assert list(result.tests) == ["c", "again-a", "mean"]
    for when in ("before", "final"):
        values = [result.tests[name][when]["loss"] for name in ("c", "again-a", "mean")]
        assert values[2] == pytest.approx((values[0] + values[1]) / 2)
    assert (result.tests["c"]["final"]["loss"] < result.tests["c"]["before"]["loss"]) == (method == "lily")
    assert result.rows["tests.c"] == 8
    console = Console(record=True, width=80)
    report.print_result(result, recipe, tmp_path / "run", console)
    shown = console.export_text()
    line = next(line for line in shown.splitlines() if "again-a" in line)
    assert f"{result.tests['again-a']['final']['loss']:.4f}" in line
    if method == "lily":
        card = (tmp_path / "run" / "best" / "README.md").read_text()
        assert "| untrained → trained | rows | exact_match | loss |" in card
        assert f" → {result.tests['mean']['final']['loss']:.4f} |" in card
        assert "a.jsonl`, `" in card


def test_a_run_without_further_test_sets_tells_of_none(made):
    recipe = made("data.tests=null", "data.mix=null")
    assert data.load_splits(recipe).tests == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.tests.mean={path: x}"], r"data\.tests\.mean: is the name of the mean over the sets"),
        (["data.tests={'a b': {path: x}}"], r"data\.tests\.a b: expected letters, digits"),
        (["data.tests.c.paht=x"], r"data\.tests\.c\.paht: unknown key; did you mean path"),
        (["data.mix.b={}"], r"data\.mix\.b: give exactly one of path, package and hub"),
        (["data.tests.c={hub: some/set}"], r"data\.tests\.c: needs split: which split of some/set"),
        (["data.mix.b.split=x"], r"data\.mix\.b\.split: goes with hub"),
    ],
)
def test_a_set_that_cannot_be_is_named(made, changes, says):
    with pytest.raises(LilyError, match=says):
        made(*changes)


def test_what_is_wrong_with_a_sets_rows_names_its_line(made, tmp_path):
    with pytest.raises(LilyError, match=r"override .*nowhere\.jsonl does not exist"):
        data.load_splits(made("data.tests.c.path=nowhere.jsonl"))
    recipe = made("data.tests.c.path=" + str(write_jsonl(tmp_path / "d.jsonl", [{"question": "a", "answer": ""}])))
    with pytest.raises(LilyError, match=r"d\.jsonl: column 'answer' is empty in row 1"):
        data.load_splits(recipe)


def test_a_class_that_only_a_test_set_has_is_refused(tmp_path, encoder):
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", rows()), tmp_path)
    values["data"]["tests"] = {"more": {"path": str(write_jsonl(tmp_path / "m.jsonl", [{"text": "a", "label": "7"}]))}}
    with pytest.raises(
        LilyError, match=r"recipe\.yaml:\d+: data\.tests\.more has the label '7', which no training row"
    ):
        data.load_splits(loader.load_recipe(write_recipe(tmp_path, values)))
