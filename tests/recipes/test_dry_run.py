"""`lily plan RECIPE`: the dry run on real recipe, data and model files."""

from __future__ import annotations

import json

import pytest
from recipes_helpers import classification, rows, sft, write_jsonl, write_recipe
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import loader, train


def test_the_dry_run_shows_the_mask_and_plans_what_training_does(tmp_path, chat_model, chat_table):
    path = write_recipe(tmp_path, sft(chat_model, chat_table, tmp_path))
    out = CliRunner().invoke(app, ["plan", path, "train.max_steps=1", "--json"])
    assert out.exit_code == 0, out.output
    values = json.loads(out.stdout)
    assert values["recipe"]["train"]["max_steps"] == 1
    trained = "".join(part["text"] for part in values["preview"] if part["trained"])
    assert trained.split() in (["yes", "<end>"], ["no", "<end>"])
    result = train.train(loader.load_recipe(path, ["train.max_steps=1"]), quiet=True)
    assert values["plan"]["parameters"]["total"] == result.parameters["adapter"]
    text = CliRunner().invoke(app, ["plan", path]).stdout
    assert "<end><<<" in text.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize("block", [{"r": 4}, {"params": "3k"}, {}])
def test_a_partial_block_plans_and_trains_the_same_adapter(tmp_path, encoder, block):
    table = write_jsonl(tmp_path / "t.jsonl", rows())
    path = write_recipe(tmp_path, classification(encoder, table, tmp_path, lily=block))
    values = json.loads(CliRunner().invoke(app, ["plan", path, "--json"]).stdout)
    result = train.train(loader.load_recipe(path, ["train.max_steps=1"]), quiet=True)
    assert values["plan"]["parameters"]["total"] == result.parameters["adapter"]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (classification, "data.max_length=65", "data.max_length=65: the model reads at most 64 tokens; lower it"),
        (classification, "targets=[quer]", "targets='quer' matches no module; did you mean query"),
        (sft, "data.max_length=2", "no example fits data.max_length=2"),
    ],
)
def test_a_dry_run_refuses_what_training_refuses(tmp_path, encoder, chat_model, chat_table, kind, change, message):
    if kind is sft:
        values = sft(chat_model, chat_table, tmp_path)
    else:
        values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", rows()), tmp_path)
    path, said = write_recipe(tmp_path, values), []
    for command in ("plan", "train"):
        with pytest.raises(LilyError) as caught:
            CliRunner().invoke(app, [command, path, change], catch_exceptions=False)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert message in said[0]


def test_the_recipe_may_be_named_by_an_option_too(tmp_path, encoder):
    path = write_recipe(tmp_path, classification(encoder, write_jsonl(tmp_path / "t.jsonl", rows()), tmp_path))
    said = CliRunner().invoke(app, ["plan", path, "lily.r=2", "train.epochs=3", "--json"]).stdout
    assert json.loads(said)["recipe"]["train"]["epochs"] == 3
    assert CliRunner().invoke(app, ["plan", "--recipe", path, "lily.r=2", "train.epochs=3", "--json"]).stdout == said
    assert "--recipe" not in CliRunner().invoke(app, ["plan", "--help"]).stdout


def test_memory_is_that_of_the_longest_example_and_not_of_what_would_be_cut(tmp_path, encoder):
    table = write_jsonl(tmp_path / "t.jsonl", rows())
    path = write_recipe(tmp_path, classification(encoder, table, tmp_path))
    longest = max(part["lengths"]["longest"] for part in planned(path)["data"]["parts"])
    assert planned(path, "data.max_length=64")["plan"]["tokens"] == longest < 64
    assert planned(path, "data.max_length=4")["plan"]["tokens"] == 4
    assert planned(path, "--tokens", "30")["plan"]["tokens"] == 30


def planned(path, *more):
    return json.loads(CliRunner().invoke(app, ["plan", path, "--json", *more]).stdout)


def test_a_dry_run_writes_nothing(tmp_path, encoder):
    path = write_recipe(tmp_path, classification(encoder, write_jsonl(tmp_path / "t.jsonl", rows()), tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert CliRunner().invoke(app, ["plan", path]).exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before
