"""Multiple choice by log-likelihood, against a plain slow reference."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from recipes_helpers import rows, sft, tokenizer, write_jsonl, write_recipe
from transformers import AutoModelForCausalLM

from lily.errors import LilyError
from lily.recipes import data, loader, train
from lily.recipes.results.adapter import Adapter
from lily.recipes.scoring import choices

ASKED = {"after": "answer is ", "separator": "/", "completion": "so {choice}"}


def offered(count=40):
    """Prompts that offer choices, of unlike lengths."""
    out = []
    for i, row in enumerate(rows(count)):
        offers = ["yes", "no"] if i % 3 else ["very good", "bad", "not awful and fine"]
        right = offers[int(row["label"])]
        out.append(
            {
                "question": f"question {row['text'] * (1 + i % 4)} answer is {'/'.join(offers)}",
                "answer": f"so {right}",
                "offers": {"text": [f"so {offer}" for offer in offers]},
            }
        )
    return out


@pytest.fixture
def made(tmp_path, chat_model):
    def make(*overrides, table=None, asked=ASKED, metrics=("accuracy", "accuracy_norm", "loss")):
        values = sft(chat_model, write_jsonl(tmp_path / "t.jsonl", table or offered()), tmp_path)
        values["data"] |= {"choices": asked, "max_length": 60}
        values["metrics"] = list(metrics)
        return loader.load_recipe(write_recipe(tmp_path, values), list(overrides))

    return make


def reference(model, tok, row, chat):
    """One choice at a time, in float64, unbatched: the sum of log p(token | all before it) over the choice's tokens."""
    prompt = row["prompt"]
    if chat:
        turn = [{"role": "user", "content": prompt}]
        prompt = tok.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    known = len(tok(prompt, add_special_tokens=not chat)["input_ids"])
    out = []
    for choice in row["choices"]:
        ids = tok(prompt + choice, add_special_tokens=not chat)["input_ids"]
        with torch.no_grad():
            found = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
        out.append(sum(found[i - 1, ids[i]].item() for i in range(known, len(ids))))
    return np.array(out)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_log_likelihoods_are_those_of_one_choice_at_a_time_however_rows_are_batched(made, chat_model, chat, batch):
    recipe, tok = made(f"data.chat={chat}", f"train.eval_batch_size={batch}"), tokenizer(chat=True)
    table = data.rows_of(recipe.data.train, recipe)
    if not chat:
        table = [{**row, "prompt": row["prompt"] + " "} for row in table]
    found = choices.log_likelihoods(AutoModelForCausalLM.from_pretrained(chat_model), table, recipe, tok)
    plain = AutoModelForCausalLM.from_pretrained(chat_model)
    for row, values in zip(table, found, strict=True):
        np.testing.assert_allclose(values, reference(plain, tok, row, chat), rtol=1e-5)  # float32 against float64


def test_accuracy_takes_the_likeliest_and_accuracy_norm_the_likeliest_per_byte(made, monkeypatch):
    recipe = made()
    table = [
        {"choices": ["ab", "abcd"], "completion": "ab"},
        {"choices": ["ab", "abcd"], "completion": "abcd"},
        {"choices": ["x", "é"], "completion": "é"},  # two bytes
        {"choices": ["x", "y"], "completion": "x"},
        {"choices": ["x", "y"], "completion": "y"},
    ]
    found = [np.array(values) for values in ([-1, -1.9], [-1, -1.9], [-1, -1.9], [-1, -1], [-1, -1])]
    monkeypatch.setattr(choices, "log_likelihoods", lambda *a: found)
    # by sum the first everywhere; per byte the second but for the last two, where the first of equals counts
    found = choices.right(None, table, recipe, None)
    assert {name: sum(rows) for name, rows in found.items()} == {"accuracy": 2, "accuracy_norm": 3}


def test_choices_that_differ_in_the_last_token_share_one_pass(made):
    recipe, tok = made(), tokenizer(chat=True)
    row = {"prompt": "is it good", "choices": ["so yes", "so no", "so very good"], "completion": "so no"}
    shared = choices.by_input(choices.scored_choices(0, row, recipe, tok))
    assert [len(of_one) for of_one in shared.values()] == [2, 1]
    for of_one in shared.values():
        for one in of_one:
            assert tok.decode(one.ids[one.start :]) == row["choices"][one.choice]  # no end token


def test_the_template_stands_around_the_prompt_and_white_space_goes_with_the_choice(made):
    tok = tokenizer(chat=True)
    recipe = made("data.chat=false", "data.template='question {prompt} answer '")
    (one, _) = choices.scored_choices(0, {"prompt": "the film", "choices": ["yes", "no"]}, recipe, tok)
    assert tok.decode(one.ids) == "question the film answer yes"
    assert tok.decode(one.ids[one.start :]) == "yes"


def test_a_prompt_that_is_too_long_loses_its_beginning_and_a_choice_that_is_too_long_is_an_error(made):
    recipe, tok = made("data.max_length=3", "data.chat=false"), tokenizer(chat=True)
    (one, _) = choices.scored_choices(0, {"prompt": "the film was good ", "choices": ["so yes", "so no"]}, recipe, tok)
    assert tok.decode(one.ids) == "good so yes"
    assert one.start == 1
    with pytest.raises(LilyError, match=r"data\.max_length=3: the choice 'so very very' alone has 3 tokens; raise it"):
        choices.scored_choices(0, {"prompt": "the film ", "choices": ["so very very", "so no"]}, recipe, tok)


def test_choices_are_read_off_the_prompt_or_out_of_a_column(made):
    by_prompt = made()
    by_column = made(asked={"column": "offers.text"})
    found = data.rows_of(by_prompt.data.train, by_prompt)
    assert found == data.rows_of(by_column.data.train, by_column)
    assert found[0]["choices"] == ["so very good", "so bad", "so not awful and fine"]
    bare = made(
        asked={"column": "offers", "completion": "so {choice}"}, table=[{**offered()[1], "offers": ["no", "yes"]}]
    )
    assert data.rows_of(bare.data.train, bare)[0]["choices"] == ["so no", "so yes"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": "so maybe"}, r"row 1: the completion 'so maybe' is not one of the choices \('so yes', 'so no'\)"),
        ({"question": "is it good"}, "row 1: the prompt has no 'answer is '"),
        ({"question": "answer is yes"}, "row 1: data.choices finds 1, expected two or more"),
        ({"question": "answer is "}, "row 1: data.choices finds 0, expected two or more"),
    ],
)
def test_a_row_whose_choices_cannot_be_is_named(made, row, says):
    recipe = made(table=[{**offered()[1], **row}])
    with pytest.raises(LilyError, match=r"recipe\.yaml:\d+: .*" + says):
        data.rows_of(recipe.data.train, recipe)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"after": "a", "column": "b"}, "data.choices: give exactly one of column and after"),
        ({}, "data.choices: give exactly one of column and after"),
        ({"after": "a", "completion": "so"}, r"data.choices: completion must have \{choice\} once"),
        ({"before": "a"}, "data.choices.before: unknown key"),
        (None, "metrics: accuracy of sft needs data.choices"),
    ],
)
def test_choices_that_do_not_fit_the_recipe_are_refused(made, asked, says):
    with pytest.raises(LilyError, match=says):
        made(asked=asked)


def test_a_column_of_choices_that_is_none_is_named(made):
    recipe = made(asked={"column": "offer"})
    with pytest.raises(LilyError, match=r"no column 'offer' \(data\.choices\.column\); did you mean 'offers'"):
        data.rows_of(recipe.data.train, recipe)
    recipe = made(asked={"column": "answer"})
    with pytest.raises(LilyError, match="column 'answer' holds 'so very good', expected a list of texts"):
        data.rows_of(recipe.data.train, recipe)


def test_accuracy_chooses_the_best_epoch_and_eval_finds_it_again(made, tmp_path):
    result = train.train(made("train.epochs=4"), quiet=True)
    found = [h["accuracy"] for h in result.history]
    assert result.best["value"] == max(found)
    assert result.best["epoch"] == result.history[found.index(max(found))]["epoch"]
    assert set(result.final) == set(result.before) == {"accuracy", "accuracy_norm", "loss"}
    assert result.final["loss"] < result.before["loss"]
    again = Adapter(str(tmp_path / "run")).evaluate()
    assert again == pytest.approx(result.final, abs=1e-6)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["metric"] == "accuracy"
