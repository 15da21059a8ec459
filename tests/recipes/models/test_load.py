"""Models and tokenizers in folders: the task's head, one padding token for both, and one message for a bad folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from recipes_helpers import SPECIAL, WORDS, tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from lily.errors import LilyError
from lily.recipes import models
from lily.recipes.models import convert
from lily.recipes.spec.schema import Model


@pytest.fixture
def copy(encoder, tmp_path):
    """A copy of the tiny encoder, to be broken."""
    return shutil.copytree(encoder, tmp_path / "copy")


def at(folder, **keys):
    return Model(path=str(folder), **keys)


def decoder(folder, eos, own_padding):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=len(WORDS) + len(SPECIAL),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=eos,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = tokenizer(chat=True)
    if not own_padding:
        words.pad_token = None
    words.save_pretrained(folder)
    return folder


def test_the_head_has_the_recipes_classes(encoder):
    model = models.load_model(at(encoder), "text-classification", ("bad", "good", "so"))
    assert model.config.id2label == {0: "bad", 1: "good", 2: "so"}
    assert model.classifier.out_features == 3
    assert not model.training


def test_regression_has_one_output(encoder):
    model = models.load_model(at(encoder), "text-regression")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_sft_loads_a_causal_model(chat_model):
    assert type(models.load_model(at(chat_model), "sft")).__name__ == "LlamaForCausalLM"


def test_the_dtype_is_the_one_asked_for(encoder):
    model = models.load_model(at(encoder, dtype="bfloat16"), "text-regression")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("task", ["text-classification", "text-regression"])
def test_the_meta_model_has_the_same_names_and_shapes_and_no_weights(encoder, task):
    labels = ("0", "1") if task == "text-classification" else None
    real, meta = models.load_model(at(encoder), task, labels), models.meta_model(at(encoder), task)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in meta.parameters())


def test_a_meta_model_needs_no_weights_file(copy):
    (copy / "model.safetensors").unlink()
    assert models.meta_model(at(copy), "text-classification", 4).config.num_labels == 4


@pytest.mark.parametrize(("eos", "own_padding"), [(6, True), (None, True), (6, False)])
def test_a_decoder_classifies_a_padded_text_as_it_does_alone(tmp_path, eos, own_padding):
    folder = decoder(tmp_path / "m", eos, own_padding)
    model, words = models.load_model(at(folder), "text-classification", ("a", "b")), models.load_tokenizer(at(folder))
    assert model.config.pad_token_id == words.pad_token_id

    def logits(texts):
        batch = words(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]

    # float32, other shapes in the matrix products
    torch.testing.assert_close(
        logits(["good film", "the film was not very bad"]), logits(["good film"]), atol=1e-5, rtol=0
    )


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "Error while deserializing header"),
        (pickle_only, "no file named model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json; name a transformers folder"),
        (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
        (config(hidden_size="big"), "'hidden_size' expected int"),
        (config(num_attention_heads=5), "not a multiple of the number of attention heads"),
        (config(hidden_size=64), "could not be loaded"),
    ],
    ids=["cut", "pickle", "no config", "config no JSON", "config type", "config value", "other shapes"],
)
def test_a_broken_folder_is_one_message(copy, harm, message):
    harm(copy)
    with pytest.raises(LilyError) as caught:
        models.load_model(at(copy), "text-classification", ("0", "1"))
    assert message in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize(("task", "outputs"), [("text-classification", 3), ("text-regression", 1)])
def test_a_head_of_another_size_is_replaced_and_that_is_said_once(encoder, tmp_path, task, outputs):
    whole = models.load_model(at(encoder), "text-classification", ("a", "b"))
    whole.save_pretrained(tmp_path)
    tokenizer(chat=False).save_pretrained(tmp_path)
    said = []
    labels = ("a", "b", "c") if outputs == 3 else None
    model = models.load_model(at(tmp_path), task, labels, announce=said.append)
    assert model.classifier.out_features == outputs
    assert torch.equal(model.bert.pooler.dense.weight, whole.bert.pooler.dense.weight)
    (line,) = said
    assert f"2 outputs and this task {outputs}: training starts with a new head" in line
    models.load_model(at(tmp_path), "text-classification", ("x", "y"), announce=said.append)
    assert len(said) == 1


def test_weights_besides_the_head_are_never_replaced(copy):
    config(hidden_size=64)(copy)
    with pytest.raises(LilyError, match=r"has shape \(.*\), but config\.json implies \(.*64"):
        models.load_model(at(copy), "text-classification", ("0", "1"))


@pytest.mark.parametrize("changes", [{"hidden_size": "big"}, {"num_attention_heads": 5}])
def test_a_bad_config_is_told_before_weights_are_read(copy, changes):
    config(**changes)(copy)
    with pytest.raises(LilyError, match="config of"):
        models.meta_model(at(copy), "text-classification")


def test_a_folder_without_tokenizer_files_is_refused(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(LilyError, match=r"found none of tokenizer\.json, vocab\.txt"):
        models.load_tokenizer(at(copy))


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    words = tokenizer(chat=True)
    words.pad_token = words.eos_token = words.unk_token = None
    LlamaConfig().save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(LilyError, match="no padding, end or unknown token"):
        models.load_tokenizer(at(tmp_path))


def test_a_hub_id_is_left_to_transformers():
    assert models.local_model(Model(hub="some/model")) == "some/model"


@pytest.mark.parametrize(("format", "name"), [("gguf", "m.gguf"), ("onnx-dinov2", "m.onnx")])
def test_a_file_of_another_kind_is_refused_and_leaves_nothing(tmp_path, monkeypatch, format, name):
    pytest.importorskip({"gguf": "gguf", "onnx-dinov2": "onnx"}[format], reason="needs lily-peft[dev]")
    monkeypatch.setenv("LILY_CACHE", str(tmp_path / "cache"))
    (tmp_path / name).write_bytes(b"nope" * 50)
    with pytest.raises(LilyError, match="not a "):
        convert.converted(tmp_path / name, format)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_folder_is_not_a_gguf_file(encoder):
    with pytest.raises(LilyError, match="format: gguf needs a file, not a folder"):
        models.local_model(at(encoder, format="gguf"))
