"""`lily plan RECIPE` for people: what they decide on, where it comes from, in 80 columns."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from recipes_helpers import classification, rows, sft, write_jsonl, write_recipe
from rich.console import Console
from typer.testing import CliRunner

from lily.cli.main import app
from lily.cli.plan_recipe import duration, marked
from lily.io import tables
from lily.recipes import loader, pace
from lily.recipes.pace import Work, measure, work_of
from lily.recipes.schedule import schedule_of
from lily.recipes.trainer.resumable import due


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def line(text: str, start: str) -> str:
    """The row of the table that starts with a word, with its continuation lines, without runs of spaces."""
    lines = text.splitlines()
    first = next(i for i, row in enumerate(lines) if row.startswith(start))
    rest = [
        row for i, row in enumerate(lines[first + 1 :]) if all(r.startswith(" ") for r in lines[first + 1 :][: i + 1])
    ]
    return " ".join(" ".join([lines[first], *rest]).split())


@pytest.fixture
def mine(tmp_path, encoder, monkeypatch):
    """A recipe that inherits from a file beside it, which inherits from the package's start for texts."""
    monkeypatch.chdir(tmp_path)
    table = write_jsonl(tmp_path / "t.jsonl", rows())
    values = classification(encoder, table, tmp_path, output="run", metrics=["accuracy"])
    train, lily = values.pop("train"), values.pop("lily")
    write_recipe(tmp_path, {"extends": "base/encoder", "lily": {**lily, "num_B": 2}, "train": train}, "middle.yaml")
    own = {"extends": "middle.yaml", **values, "train": {"batch_size": 5, "learning_rate": 0.01}, "baselines": ["lora"]}
    return write_recipe(tmp_path, own, "mine.yaml")


def test_nothing_is_cut_in_a_narrow_terminal(mine):
    text = CliRunner().invoke(app, ["plan", "mine.yaml"], env={"COLUMNS": "50"}).stdout
    assert "\u2026" not in text
    assert "truncated" in text
    assert max(map(len, text.splitlines()[1:20])) <= 50


@pytest.mark.parametrize("width", range(60, 100))
def test_no_name_of_a_column_is_cut_where_the_numbers_are_long(width):
    header = ["", "rows", "tokens: median", "95%", "longest", "truncated", "repeated", "also in train"]
    lines = [["validation", "14", "30,002", "30,002", "30,002", "100%", "0", "0"]]
    names = tables.folded(header, lines, width)
    assert (names is None) == (width < 72)
    if names is not None:
        console = Console(width=width, file=io.StringIO())
        console.print(tables.terminal(names, lines, numbers=True, no_wrap=True, box=None, pad_edge=False))
        text = console.file.getvalue()
        assert {*text.split()} == {*" ".join([*header, *lines[0]]).split()}


@pytest.mark.parametrize("more", [(), ("--all",)])
def test_what_a_person_decides_on_is_there_with_its_origin_in_80_columns(mine, more):
    text = shown("mine.yaml", "train.max_steps=30", *more)
    assert max(map(len, text.splitlines())) <= 80
    head = " ".join(text[: text.index("data ──")].split())
    assert head == "tiny: text-classification by method lily; inherits from _encoder, middle.yaml, base/encoder"
    assert "30 = 3.75 epochs of 8, of 5 rows each" in line(text, "steps")
    assert line(text, "steps").count("command line") == 1
    assert "middle.yaml" in line(text, "steps")
    assert "4 on 12 validation rows, and the 12 test" in line(text, "evaluations")
    assert "an estimate" in line(text, "time")
    assert "timed on CPU" in line(text, "time")
    assert "an estimate" in line(text, "memory")
    assert "lily 0.01, lora 0.01" in line(text, "learning rate")
    assert "mine.yaml" in line(text, "learning rate")
    assert "lily 4 (rank 4), lora 2 (rank 2)" in line(text, "scale")
    assert "middle.yaml" in line(text, "scale")
    assert text.index("data ──") < text.index("steps") < text.index("learning rate") < text.index("scale")
    assert text.index("scale") < text.index("who shares what ──") < text.index("first example")


@pytest.mark.parametrize(
    ("change", "A", "B", "own"),
    [
        ("lily.num_A=2", "one each for layers 0 | 1, in ", "2 experts per group, for all its layers, mixed by routers "
         "per sequence", "an order of ranks, a 2 x 4 router"),
        ("lily.num_B=1", "one for layers 0-1, in ", "one for all layers of a group; nothing is routed", "an order of "),
        ("lily.routing=static", "one for", "mixed by static weights", "an order of ranks, weights"),
        ("lily={r: 3, distinct: none, gain: ones, own_r: 2, num_B: 1}", "one", "one", "a gain, A and B of rank 2"),
    ],
)  # fmt: skip
def test_who_shares_what_is_three_lines(mine, change, A, B, own):
    text = shown("mine.yaml", change)
    lines = text[text.index("who shares what") :].splitlines()[1:4]
    assert lines[0].startswith(f"A: {A}")
    assert "6 groups: query, key, value, dense" in lines[0]
    assert lines[1].startswith("B: ")
    assert B in lines[1]
    assert lines[2].startswith(f"Each layer alone: {own}")


def test_the_whole_recipe_is_printed_with_its_origins_only_if_asked(mine):
    brief, whole = shown("mine.yaml"), shown("mine.yaml", "--all")
    assert "early_stopping" not in brief
    assert "Who shares what" not in brief
    assert "--all shows every key" in brief
    lines = {row.split(":")[0].strip(): row for row in whole.splitlines() if ":" in row}
    assert lines["epochs"].endswith("# middle.yaml")
    assert lines["head_learning_rate"].endswith("# base/encoder")
    assert "# mine.yaml:" in lines["batch_size"]
    assert "#" not in lines["early_stopping"]
    assert "Who shares what" in whole


def test_a_marked_recipe_is_still_the_recipe(mine, tmp_path):
    recipe = loader.load_recipe(mine)
    (tmp_path / "again.yaml").write_text(marked(loader.dump_recipe(recipe), loader.origins(recipe)))
    assert loader.load_recipe(str(tmp_path / "again.yaml")) == recipe


@pytest.mark.parametrize("name", ["quickstart", "cola", "chat", "paper/glue-cola"])
def test_texts_of_several_lines_are_not_cut_by_the_mark(name):
    recipe = loader.load_any(name)
    text = loader.dump_recipe(recipe)
    assert yaml.safe_load(marked(text, loader.origins(recipe))) == yaml.safe_load(text)


def test_a_scale_that_nothing_chose_is_warned_of(mine):
    text = " ".join(shown("mine.yaml").split())
    assert "warning: scales differ" in text
    assert "warning: scales" not in " ".join(shown("mine.yaml", "lily.scaling=null").split())


def test_a_chat_recipe_is_planned_in_80_columns_too(tmp_path, chat_model, chat_table, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = shown(write_recipe(tmp_path, sft(chat_model, chat_table, tmp_path)))
    assert "generated and scored answers come on top" in " ".join(text.split())
    assert "per token" in text
    assert max(map(len, text.splitlines())) <= 80


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train",
    [
        {"epochs": 3, "batch_size": 32},
        {"epochs": 2.5, "batch_size": 7, "evaluate_every": 10},
        {"max_steps": 11, "batch_size": 8, "gradient_accumulation": 3},
        {"epochs": 1, "batch_size": 64, "evaluate_every": 2},
    ],
)
def test_evaluations_are_counted_as_training_counts_them(train):
    recipe = loader.load_recipe("sst2", [f"train={train}"])
    schedule = schedule_of(recipe, 100)
    every, per_epoch = recipe.train.evaluate_every, schedule.per_epoch
    assert per_epoch == math.ceil(math.ceil(100 / recipe.train.batch_size) / recipe.train.gradient_accumulation)
    steps = range(1, schedule.steps + 1)
    assert schedule.evaluations == sum(due(every, step, step / per_epoch, step == schedule.steps) for step in steps)


# --- time -----------------------------------------------------------------------------------------------------------


def test_an_estimate_grows_with_layers_and_names_its_device(monkeypatch):
    monkeypatch.setattr(
        pace, "_timed", lambda inputs, outputs, work, batch, device: (inputs * batch, 3 * inputs * batch)
    )
    one, two = (measure(Work([(8, 4)] * n, 2, 16, 0, "float32"), 5) for n in (1, 2))
    assert (one.forward, one.step, two.step) == (8, 24, 48)
    assert one.device.startswith("CPU, ")
    assert measure(Work([(8, 4)], 2, 16, 32, "float32"), 5).step == 48  # as much again in attention


def test_a_layer_is_timed():
    forward, step = pace._timed(64, 32, Work([(64, 32)], 4, 8, 0, "float32"), 2, torch.device("cpu"))
    assert 0 < forward < step < 1


def test_a_model_without_attention_is_not_estimated():
    assert work_of(SimpleNamespace(hidden_size=8, num_hidden_layers=2), [(8, 8)], 2, 16, "float32") is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (12.34, "12 s"), (89, "89 s"), (95, "1.6 min"), (754, "13 min"), (7300, "2 h"), (4e5, "4.6 days")],
)
def test_an_estimate_has_two_digits(seconds, text):
    assert duration(seconds) == text
