"""Trained rows of embeddings (`trainable_token_indices`) through calls on whole models, as beside a LoRA."""

from __future__ import annotations

import pytest
import torch
from helpers import build, inputs, predict
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from lily import LilyConfig, LilyError

pytestmark = pytest.mark.filterwarnings("ignore")

X = inputs("llama")
ROWS, OTHER = [5, 7], [6, 7]
METHODS = ["lora", "token", "static"]


def config(method, rows=ROWS):
    shared = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": rows, "task_type": "CAUSAL_LM"}
    return LoraConfig(**shared) if method == "lora" else LilyConfig(num_A=1, num_B=2, routing=method, **shared)


def trained(model, seed=2):
    """The model with random values for everything that its adapters train."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("lora_", "lily_", "trainable_tokens_delta")):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


def adapted(method, rows=ROWS, seed=2):
    return trained(get_peft_model(build("llama"), config(method, rows)), seed)


def rows_of(model):
    return model.get_submodule("base_model.model.model.embed_tokens.token_adapter").trainable_tokens_delta


@pytest.mark.parametrize("method", METHODS)
def test_rows_frozen_by_their_name_make_the_status_irregular(method):
    model = adapted(method)
    rows_of(model).default.requires_grad = False
    assert model.get_model_status().requires_grad == {"default": "irregular"}
    assert not rows_of(model)["default"].requires_grad
    rows_of(model).default.requires_grad = True
    assert model.get_model_status().requires_grad == {"default": True}


@pytest.mark.parametrize("method", METHODS[1:])  # LoRA's cannot be saved: KeyError
def test_an_adapter_without_rows_is_saved_beside_one_with_rows(method, tmp_path):
    model = adapted(method)
    model.add_adapter("plain", config(method, None))
    trained(model)
    expected = {}
    for name in ("default", "plain"):
        model.set_adapter(name)
        expected[name] = predict(model, X)
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(PeftModel.from_pretrained(build("llama"), tmp_path), X), expected["default"])
    assert torch.equal(predict(PeftModel.from_pretrained(build("llama"), tmp_path / "plain"), X), expected["plain"])
    assert not torch.equal(expected["default"], expected["plain"])


@pytest.mark.parametrize("method", METHODS[1:])  # LoRA's cannot be swapped: KeyError
def test_rows_are_swapped_too(method, tmp_path):
    other = adapted(method, seed=5)
    other.save_pretrained(tmp_path)
    model = adapted(method)
    assert not torch.equal(predict(model, X), predict(other, X))
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(predict(model, X), predict(other, X))
    with pytest.raises(LilyError, match="trains the same beside its layers"):
        hotswap_adapter(adapted(method, OTHER), str(tmp_path), "default", torch_device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_each_row_of_a_batch_has_its_adapters_rows(method):
    model = adapted(method)
    model.add_adapter("other", config(method, OTHER))
    trained(model)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(predict(model, X))
    with torch.no_grad():
        mixed = model(**X, adapter_names=["default", "other", "default"]).logits
    assert torch.allclose(mixed[1], alone[1][1], atol=1e-5)
    assert torch.allclose(mixed[::2], alone[0][::2], atol=1e-5)
    assert ((alone[0] - alone[1]).abs() > 1e-3).any()


@pytest.mark.parametrize("method", METHODS)
def test_the_rows_of_two_adapters_cannot_be_active_at_once(method):
    model = adapted(method)
    model.add_adapter("other", config(method, OTHER))
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "other"])
