"""A run that cannot work is refused before a weight is read or a file is written, and nothing foreign is touched."""

from __future__ import annotations

import pytest
from recipes_helpers import classification, rows, sft, write_jsonl, write_recipe
from transformers import OPTConfig, OPTForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from lily.errors import LilyError
from lily.recipes import loader, methods, packages, preflight, train


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.setattr("lily.recipes.models.load_model", lambda *a, **k: pytest.fail("weights were read"))


def make(kind, folder, model, overrides=()):
    table = [{**r, "question": f"question {r['text']}", "answer": ("no", "yes")[int(r["label"])]} for r in rows()]
    values = kind(model, write_jsonl(folder / "t.jsonl", table), folder)
    return loader.load_recipe(write_recipe(folder, values), list(overrides))


def refused(recipe, message, **flags):
    with pytest.raises(LilyError, match=message):
        train.train(recipe, quiet=True, **flags)


def test_an_example_that_cannot_fit_is_refused_before_anything_is_written(tmp_path, chat_model):
    refused(make(sft, tmp_path, chat_model, ["data.max_length=2"]), "raise it to 11 or more")
    assert not (tmp_path / "run").exists()


def test_a_test_file_of_which_no_answer_fits_is_refused_before_anything_is_written(tmp_path, chat_model):
    recipe = make(sft, tmp_path, chat_model)
    long = write_jsonl(tmp_path / "test.jsonl", [{"question": "the film " * 30, "answer": "yes"}])
    refused(
        make(sft, tmp_path, chat_model, [f"data.test.path={long}"]),
        f"no example fits data.max_length={recipe.data.max_length}: every prompt of the test rows fills it",
    )
    assert not (tmp_path / "run").exists()


def test_a_target_that_is_only_the_head_is_refused_before_anything_is_written(tmp_path, encoder):
    recipe = make(classification, tmp_path, encoder, ["targets=[classifier]"])
    refused(recipe, "targets='classifier' matches only modules that are trained whole anyway")
    assert not (tmp_path / "run").exists()


def test_a_head_among_the_targets_is_no_layer_of_the_plan(tmp_path, encoder):
    from lily.recipes import models

    def size(targets):
        recipe = make(classification, tmp_path, encoder, [f"targets={targets}", "lily={params: 3k}"])
        return methods.peft_config(recipe, models.meta_model(recipe.model, recipe.task))

    assert size("[query, classifier]").r == size("[query]").r


def test_messages_without_a_chat_template_are_refused_before_anything_is_written(tmp_path, chat_model, monkeypatch):
    recipe = make(sft, tmp_path, chat_model)
    turns = [{"role": "user", "content": "is it good"}, {"role": "assistant", "content": "yes"}]
    write_jsonl(tmp_path / "t.jsonl", [{"messages": turns}] * 20)
    columns = type(recipe.data.columns)(messages="messages")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"columns": columns})})
    from recipes_helpers import tokenizer

    monkeypatch.setattr("lily.recipes.models.load.load_tokenizer", lambda model: tokenizer(chat=False))
    refused(recipe, "needs a tokenizer with a chat template")
    assert not (tmp_path / "run").exists()


def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path, encoder):
    refused(make(classification, tmp_path, encoder, ["data.max_length=65"]), "reads at most 64 tokens; lower it")


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        (RobertaForSequenceClassification(RobertaConfig(**SMALL, max_position_embeddings=66)), 64),
        (OPTForSequenceClassification(OPTConfig(**SMALL, word_embed_proj_dim=16, max_position_embeddings=64)), 64),
    ],
    ids=["roberta", "opt"],
)
def test_positions_that_start_late_leave_fewer_tokens(tmp_path, encoder, model, limit):
    preflight.check_length(make(classification, tmp_path, encoder, [f"data.max_length={limit}"]), model)
    with pytest.raises(LilyError, match=f"at most {limit} tokens"):
        preflight.check_length(make(classification, tmp_path, encoder, [f"data.max_length={limit + 1}"]), model)


@pytest.mark.parametrize(
    ("kind", "changes", "absent", "message"),
    [
        (classification, [], "sklearn", r'sklearn is not installed; pip install "lily-peft\[demo\]"'),
        (sft, [], "trl", r'trl is not installed; pip install "lily-peft\[sft\]"'),
        (sft, ["train.report_to=[wandb]"], "wandb", "wandb is not installed; pip install wandb"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(
    tmp_path, encoder, chat_model, monkeypatch, kind, changes, absent, message
):
    recipe = make(kind, tmp_path, chat_model if kind is sft else encoder, changes)
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == absent else object())
    refused(recipe, message)
    assert not (tmp_path / "run").exists()


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, encoder):
    recipe, run = make(classification, tmp_path, encoder), tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / ".best.new").mkdir()
    (run / "metrics.json").write_text("{}")
    preflight.check_folder(recipe, run, resume=False, overwrite=True)
    (run / "precious").write_text("x")
    refused(recipe, "holds precious, which no run wrote; move it away", overwrite=True)
    assert (run / "precious").read_text() == "x"
    assert (run / "best").is_dir()


def test_only_a_run_of_the_same_recipe_is_resumed(tmp_path, encoder):
    recipe, run = make(classification, tmp_path, encoder), tmp_path / "run"
    run.mkdir()
    refused(recipe, "holds no run, so there is nothing to resume", resume=True)
    (run / "recipe.yaml").write_text(loader.dump_recipe(recipe))
    other = make(classification, tmp_path, encoder, ["train.epochs=9", "lily.r=8", "train.learning_rate=1.0"])
    refused(other, r"lily\.r was 4 and is now 8; train\.learning_rate was 0\.01 and is now 1\.0", resume=True)
    preflight.check_folder(make(classification, tmp_path, encoder, ["train.epochs=9"]), run, True, False)


def test_a_default_written_out_is_no_change_to_a_resumed_recipe(tmp_path, encoder):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(loader.dump_recipe(make(classification, tmp_path, encoder)))
    written = make(classification, tmp_path, encoder, ["train.schedule=linear", "lora.r=equal"])
    preflight.check_folder(written, run, True, False)
    (run / "recipe.yaml").write_text(loader.dump_recipe(written, complete=False))
    preflight.check_folder(make(classification, tmp_path, encoder), run, True, False)


def test_an_output_that_is_a_file_is_refused(tmp_path, encoder):
    (tmp_path / "run").write_text("x")
    refused(make(classification, tmp_path, encoder), "is a file; name a folder", overwrite=True)
