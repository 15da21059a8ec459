"""Encoding, and that the preview shows what the loss sees."""

from __future__ import annotations

import pytest
from recipes_helpers import classification, rows, sft, tokenizer, write_jsonl, write_recipe

from lily.errors import LilyError
from lily.recipes import loader
from lily.recipes.data import tasks
from lily.recipes.data.tasks import IGNORED


def recipe(kind, folder, model, overrides=()):
    table = write_jsonl(folder / "t.jsonl", rows())
    return loader.load_recipe(write_recipe(folder, kind(model, table, folder)), list(overrides))


def test_the_loss_is_on_the_completion_only(tmp_path, chat_model):
    r, tok = recipe(sft, tmp_path, chat_model), tokenizer(chat=True)
    (example,) = tasks.encode([{"prompt": "question the film", "completion": "yes"}], r, tok, None)
    assert tok.decode(example["input_ids"]) == "<user> question the film <end> <assistant> yes <end>"
    trained = [t for t, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORED]
    assert tok.decode(trained) == "yes <end>"


def test_every_assistant_turn_of_a_conversation_is_trained_once(tmp_path, chat_model):
    r, tok = recipe(sft, tmp_path, chat_model), tokenizer(chat=True)
    turns = [("user", "is it good"), ("assistant", "yes"), ("user", "is it bad"), ("assistant", "no")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    trained = [tok.decode([t for t in e["labels"] if t != IGNORED]) for e in tasks.encode([row], r, tok, None)]
    assert trained == ["yes <end>", "no <end>"]


def test_without_a_chat_template_the_texts_are_joined_and_ended(tmp_path, chat_model):
    r, tok = recipe(sft, tmp_path, chat_model, ["data.chat=false"]), tokenizer(chat=True)
    (example,) = tasks.encode([{"prompt": "question the film ", "completion": "yes "}], r, tok, None)
    assert tok.decode(example["input_ids"]) == "question the film yes <end>"
    assert tok.decode([t for t in example["labels"] if t != IGNORED]) == "yes <end>"


def test_examples_whose_completion_does_not_fit_are_left_out(tmp_path, chat_model):
    r, tok = recipe(sft, tmp_path, chat_model, ["data.max_length=8"]), tokenizer(chat=True)
    table = [{"prompt": "question", "completion": "yes"}, {"prompt": "the film " * 9, "completion": "no"}]
    assert len(tasks.encode(table, r, tok, None)) == 1
    with pytest.raises(LilyError, match=r"no example fits data.max_length=8: .* raise it to"):
        tasks.encode(table[1:], r, tok, None)


def test_the_preview_shows_the_mask_that_trls_collator_gives_the_loss(tmp_path, chat_model):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    r, tok = recipe(sft, tmp_path, chat_model), tokenizer(chat=True)
    row = {"prompt": "question the film", "completion": "yes"}
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(tasks.encode([row, {**row, "prompt": "no"}], r, tok, None))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    segments = tasks.preview(r, tok, row)
    assert [trained for _, trained in segments] == [False, True]
    assert segments[0][0] == tok.decode(ids[labels == IGNORED])
    assert segments[1][0] == tok.decode(ids[labels != IGNORED])


def test_pairs_and_labels_are_encoded(tmp_path, encoder):
    r, tok = recipe(classification, tmp_path, encoder), tokenizer(chat=False)
    (example,) = tasks.encode([{"text": "the film", "text_pair": "was good", "label": "no"}], r, tok, ("yes", "no"))
    assert tok.decode(example["input_ids"]) == "[CLS] the film [SEP] was good [SEP]"
    assert example["labels"] == 1
    assert tasks.preview(r, tok, {"text": "the film", "label": "no"})[0][0] == "[CLS] the film [SEP]"
