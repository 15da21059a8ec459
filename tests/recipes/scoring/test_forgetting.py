"""Forgetting: the loss on general text, before and after training."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from recipes_helpers import classification, rows, sft, tokenizer, write_jsonl, write_recipe
from rich.console import Console
from transformers import AutoModelForCausalLM

import lily
from lily.errors import LilyError
from lily.recipes import loader, preflight, train
from lily.recipes.results import card

TEXTS = ["the film was a very good film and so fine", "yes", "no question is not so bad", "awful actors"]


def make(tmp_path, chat_model, table=None, overrides=(), **forgetting):
    chat = [{"question": f"question {r['text']}", "answer": ("no", "yes")[int(r["label"])]} for r in rows()]
    values = sft(chat_model, write_jsonl(tmp_path / "t.jsonl", chat), tmp_path)
    general = write_jsonl(tmp_path / "general.jsonl", table or [{"a": [{"text": t}]} for t in TEXTS])
    values["forgetting"] = {"file": {"path": str(general)}, "column": "a.0.text", **forgetting}
    return loader.load_recipe(write_recipe(tmp_path, values), list(overrides))


def by_hand(model, length=128):
    """Mean loss per token, one text at a time."""
    encode = tokenizer(chat=True)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([encode(text, truncation=True, max_length=length)["input_ids"]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return total / count


def test_forgetting_is_the_loss_on_general_text_before_and_after_training(tmp_path, chat_model):
    overrides = ["train.epochs=2", "baselines=[lora]", "lora.r=1", "forgetting.max_length=6"]
    recipe = make(tmp_path, chat_model, overrides=overrides)
    result = train.train(recipe, quiet=True)
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    found = result.forgetting
    assert found["before"] == pytest.approx(by_hand(base, 6), abs=1e-5)
    best = PeftModel.from_pretrained(base, tmp_path / "run" / "best").eval()
    assert found["after"] == pytest.approx(by_hand(best, 6), abs=1e-5)
    assert found["increase"] == pytest.approx(found["after"] - found["before"])
    assert found["increase"] != 0
    last = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_model), tmp_path / "run" / "last")
    assert found["last"] == pytest.approx(by_hand(last.eval(), 6), abs=1e-5)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["forgetting"] == found
    lora = json.loads((tmp_path / "run" / "lora" / "metrics.json").read_text())["forgetting"]
    assert result.baselines["lora"]["forgetting"] == lora["increase"] != found["increase"]
    console = Console(record=True, width=200)
    card.print_result(result, recipe, tmp_path / "[v2]", console)
    said = console.export_text()
    assert f"figures: {tmp_path}/[v2]/metrics.json" in said
    assert f"{found['increase']:+.4f}" in said
    assert f"{lora['increase']:+.4f}" in said
    assert f"{found['before']:.4f} before training" in said
    assert f"{found['increase']:+.4f}" in (tmp_path / "run" / "best" / "README.md").read_text()


@pytest.mark.slow
def test_the_best_adapter_is_chosen_among_those_that_forget_no_more_than_the_limit(tmp_path, chat_model):
    def trained(*overrides):
        recipe = make(
            tmp_path,
            chat_model,
            overrides=["train.epochs=4", "metrics=[loss]", "train.learning_rate=0.004", *overrides],
        )
        return train.train(recipe, overwrite=True, quiet=True)

    free = trained()
    grown = {h["epoch"]: h["general_loss"] - free.forgetting["before"] for h in free.history}
    limit = free.forgetting["increase"] - 1e-4  # excludes what was chosen without one
    bound = trained(f"forgetting.limit={limit}")
    assert bound.history == free.history
    within = [h for h in free.history if grown[h["epoch"]] <= limit]
    assert within
    assert bound.best["epoch"] == min(within, key=lambda h: h["loss"])["epoch"] != free.best["epoch"]
    assert bound.forgetting["increase"] == pytest.approx(grown[bound.best["epoch"]])
    assert bound.forgetting["last"] == free.forgetting["last"]
    nearest = trained("forgetting.limit=1e-9")
    assert nearest.best["epoch"] == min(grown, key=lambda epoch: grown[epoch])


def test_a_run_that_trains_nothing_forgets_nothing(tmp_path, chat_model):
    found = train.train(make(tmp_path, chat_model, overrides=["method=none"]), quiet=True).forgetting
    assert found["before"] == found["after"] == found["last"]
    assert found["increase"] == 0.0


def test_the_rows_that_are_read_are_a_fixed_sample(tmp_path, chat_model):
    table = [{"a": [{"text": f"the film was {w}"}]} for w in ("good", "bad", "fine", "awful", "a", "plot")]
    chosen = [preflight.prepare(make(tmp_path, chat_model, table, max_rows=3)).general for _ in range(2)]
    assert len(chosen[0]) == 3
    assert chosen[0] == chosen[1]
    assert all(e["labels"] == e["input_ids"] for e in chosen[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": "b"}, r"recipe\.yaml:\d+: .*row \d: no column 'b' \(forgetting\.column\).*columns: a"),
        ({"column": "a.1.text"}, r"no column 'a\.1\.text' \(forgetting\.column\)"),
        ({"column": "a"}, r"recipe\.yaml:\d+: .*column 'a' holds .*, expected text"),
        ({"file": {"path": "/nowhere.jsonl"}}, r"recipe\.yaml:\d+: .*/nowhere\.jsonl does not exist"),
        ({"max_length": 1}, r"no text of .*general\.jsonl has 2 tokens"),
    ],
    ids=str,
)
def test_general_text_that_cannot_be_read_is_refused_before_weights_are(
    tmp_path, chat_model, changes, message, monkeypatch
):
    monkeypatch.setattr("lily.recipes.models.load_model", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(LilyError, match=message):
        train.train(make(tmp_path, chat_model, **changes), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_classifier_has_no_loss_of_a_language_model_to_forget_with(tmp_path, encoder, table):
    values = classification(encoder, table, tmp_path)
    values["forgetting"] = {"file": {"path": str(table)}, "column": "text"}
    with pytest.raises(LilyError, match=r"recipe\.yaml:\d+: forgetting: needs the loss of a language model, which"):
        loader.load_recipe(write_recipe(tmp_path, values))


def with_null_space(tmp_path, chat_model, *overrides, **section):
    recipe = make(tmp_path, chat_model)
    own = {"file": recipe.forgetting.file.model_dump(exclude_none=True), "column": "a.0.text", **section}
    document = recipe.model_dump(mode="json", exclude_none=True, exclude_unset=True) | {
        "lily": {"r": 4, "null_space": own}
    }
    return loader.load_recipe(write_recipe(tmp_path, document), list(overrides))


def test_a_recipe_keeps_A_out_of_what_its_general_text_uses(tmp_path, chat_model):
    recipe = with_null_space(tmp_path, chat_model, energy=0.5)
    train.train(recipe, quiet=True)
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "best", is_trainable=True)
    encode = tokenizer(chat=True)
    batches = [{"input_ids": torch.tensor([ids])} for t in TEXTS if len(ids := encode(t)["input_ids"]) > 1]
    before = {n: p.clone() for n, p in model.named_parameters() if "lily_A" in n}
    assert before
    lily.null_space(model, batches, energy=0.5)  # the same directions, so nothing is left to project
    assert all(torch.allclose(p, before[n], atol=1e-5) for n, p in model.named_parameters() if n in before)


def test_a_null_space_needs_texts(tmp_path, chat_model):
    with pytest.raises(LilyError, match=r"lily.null_space.*gone.jsonl"):
        preflight.prepare(with_null_space(tmp_path, chat_model, "lily.null_space.file.path=gone.jsonl"))
