"""Base layers of every kind, compiled and quantized ones included."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers.utils.peft_utils import get_adapter_name
from helpers import build, inputs, predict, randomise
from peft import get_peft_model
from torch import nn

from lily import LilyConfig

pytestmark = [pytest.mark.sample(every=10), pytest.mark.filterwarnings("ignore:routing=.* on a causal model")]


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.b = layer, nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("num_B", [1, 3])
def test_a_compiled_block_has_no_graph_break_and_equals_the_eager_one(routing, num_B):
    torch.manual_seed(0)
    config = LilyConfig(r=4, num_B=num_B, routing=routing, target_modules=["a", "b"], activation="silu")
    model = randomise(get_peft_model(Block(nn.Linear(32, 16)), config))
    x = torch.randn(2, 5, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    expected, got = model(x), compiled(x)
    assert torch.allclose(got, expected, atol=1e-6)
    wanted = torch.autograd.grad(expected.sum(), [p for p in model.parameters() if p.requires_grad])
    found = torch.autograd.grad(got.sum(), [p for p in model.parameters() if p.requires_grad])
    for a, b in zip(wanted, found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_compiled_encoder_honours_the_mask():
    config = LilyConfig(r=4, num_B=3, routing="sequence", target_modules=["query", "value"], task_type="SEQ_CLS")
    model = randomise(get_peft_model(build("bert"), config)).eval()
    batch = inputs("bert")
    batch["attention_mask"][1, 4:] = 0
    expected = predict(model, batch)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="eager")(**batch).logits
    assert torch.allclose(got, expected, atol=1e-5)


def test_conv1d_equals_the_linear_layer_of_its_transpose():
    from transformers.pytorch_utils import Conv1D

    conv, linear = Conv1D(12, 8), nn.Linear(8, 12)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    config = {"r": 3, "num_B": 2, "routing": "token", "target_modules": ["0"]}
    models = [randomise(get_peft_model(nn.Sequential(base), LilyConfig(**config))) for base in (conv, linear)]
    x = torch.randn(2, 4, 8)
    assert torch.allclose(models[0](x), models[1](x), atol=1e-6)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8), (2, 0, 8)])
def test_inputs_of_any_rank_and_empty_ones_pass(routing, shape):
    config = LilyConfig(r=3, num_B=2, routing=routing, target_modules=["0"])
    model = randomise(get_peft_model(nn.Sequential(nn.Linear(8, 6)), config))
    out = model(torch.randn(shape))
    assert out.shape == (*shape[:-1], 6)


def test_settings_are_per_adapter_frozen_and_deleted_with_it():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LilyConfig(r=3, num_B=2, target_modules=["0"]))
    model.add_adapter("other", LilyConfig(r=4, num_B=1, scaling=0.5, target_modules=["0"]))
    layer = model.base_model.model[0]
    assert get_adapter_name(layer) == "default_2"  # diffusers counts the entries of `r`
    assert layer.r == {"default": 3, "other": 4}
    other = layer.settings["other"]
    assert (other.num_B, other.scaling) == (1, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        other.scaling = 1.0
    model.delete_adapter("other")
    assert list(layer.settings) == ["default"]
    assert layer._get_available_adapters() == {"default"}
