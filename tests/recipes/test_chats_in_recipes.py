"""Recipes on chats as people keep them: plan, train, evaluate, predict and forgetting read the same shapes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from chat_templates import LLAMA, WEATHER, tokenizer_of
from recipes_helpers import sft, write_jsonl, write_recipe

from lily.cli.main import main
from lily.recipes import loader, train
from lily.recipes.results.adapter import Adapter
from lily.recipes.scoring import forgetting

CALL = {"name": "weather", "arguments": {"city": "Paris"}}


def openai(i):
    function = {"name": "weather", "arguments": json.dumps(CALL["arguments"])}
    return {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": f"w {i}?"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "c", "content": f"{i} C"},
            {"role": "assistant", "content": "warm" if i % 2 else "cold", "weight": 1},
        ],
        "tools": [WEATHER],
    }


def sharegpt(i):
    return {
        "messages": [
            {"from": "human", "value": f"w {i}?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": f"{i} C"},
            {"from": "gpt", "value": "warm" if i % 2 else "cold"},
        ],
        "tools": json.dumps([WEATHER["function"]]),
    }


def recipe_of(folder, model, table, name="t.jsonl", **changes):
    values = sft(model, write_jsonl(folder / name, table), folder, **changes)
    values["data"] |= {"columns": {"messages": "messages"}, "max_length": 512}
    values["train"] |= {"epochs": 1, "batch_size": 8}
    return write_recipe(folder, values)


def test_one_run_reads_both_shapes_in_training_evaluation_prediction_and_forgetting(tools_model, tmp_path):
    general = write_jsonl(tmp_path / "general.jsonl", [sharegpt(i) for i in range(50, 54)])
    more = {"forgetting": {"file": {"path": str(general)}, "column": "messages", "max_length": 512}}
    table = [(openai, sharegpt)[i % 2](i) for i in range(12)]
    recipe = loader.load_recipe(recipe_of(tmp_path, tools_model, table, metrics=["loss", "exact_match"], **more))
    result = train.train(recipe, quiet=True)
    assert result.forgetting["increase"] != 0
    adapter = Adapter(str(tmp_path / "run"))
    texts = forgetting.general_text(recipe, adapter.tokenizer, recipe.forgetting, "forgetting")
    assert '"arguments": {"city": "Paris"}' in adapter.tokenizer.decode(texts[0]["input_ids"])
    files = [write_jsonl(tmp_path / f"{shape.__name__}.jsonl", [shape(i) for i in range(8)])
             for shape in (openai, sharegpt)]  # fmt: skip
    first, second = (adapter.evaluate(file=str(file)) for file in files)
    assert first == second
    predicted = [[row["prediction"] for row in adapter.predict([shape(3), shape(4)])] for shape in (openai, sharegpt)]
    assert predicted[0] == predicted[1]


CUT = {"messages": [{"role": "user", "content": "cut \ud83d"}, {"role": "assistant", "content": "b"}]}
DEVELOPER = [{"role": "developer", "content": "D"}, *openai(0)["messages"]]


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (CUT, "t.jsonl, row 3: column 'messages' holds half of a surrogate pair in message 1, content: '\\ud83d'"),
        ({"messages": DEVELOPER}, "t.jsonl, row 3, message 1, key 'content' of role 'developer': the model's chat"),
        ({"messages": [*openai(0)["messages"][:3], {"role": "assistant", "content": ""}]},
         "t.jsonl, row 3, message 4: content of the assistant is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "t.jsonl, row 3, message 1: content[0] is a part of type 'image_url'"),
    ],
)  # fmt: skip
def test_a_bad_message_ends_plan_and_train_alike(tools_model, tmp_path, monkeypatch, capsys, command, row, message):
    path = recipe_of(tmp_path, tools_model, [openai(0), openai(1), row, *map(openai, range(9))])
    monkeypatch.setattr(sys, "argv", ["lily", command, path])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert message in said
    assert said.startswith(f"error: {path}:")
    assert not (tmp_path / "run").exists()


def test_the_plan_shows_a_chat_with_its_tools(tools_model, tmp_path, monkeypatch, capsys):
    path = recipe_of(tmp_path, tools_model, [sharegpt(i) for i in range(12)])
    monkeypatch.setattr(sys, "argv", ["lily", "plan", path, "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    (before, off), (after, on) = [(p["text"], p["trained"]) for p in json.loads(capsys.readouterr().out)["preview"]]
    assert (off, on) == (False, True)
    assert '"name": "weather"' in before
    assert "<tool_response>" in before
    assert after in ("warm<|im_end|>\n", "cold<|im_end|>\n")


def test_a_llama_like_template_without_generation_marks_trains_too(tools_model, tmp_path, monkeypatch):
    import shutil

    model = Path(shutil.copytree(tools_model, tmp_path / "model"))
    tokenizer_of(LLAMA).save_pretrained(model)
    recipe = loader.load_recipe(recipe_of(tmp_path, model, [openai(i) for i in range(12)], metrics=["loss"]))
    result = train.train(recipe, quiet=True)
    assert result.final["loss"] < result.before["loss"]
