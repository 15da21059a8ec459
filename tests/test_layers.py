"""Base layers of every kind, compiled and quantised ones included."""

from __future__ import annotations

import pytest
import torch
from helpers import build, inputs, logits, predict, randomise
from peft import PeftModel, get_peft_model
from torch import nn

from lily import LilyConfig

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")


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


def wide_llama():
    """Wide enough for the quantisation blocks of 4-bit kernels."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
    ).eval()


def bitsandbytes_model(bits):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'lily-peft[dev]'")
    model = wide_llama()
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            if bits == 4:
                new = bnb.nn.Linear4bit(
                    old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                new.weight = bnb.nn.Params4bit(old.weight.detach(), requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(old.weight.detach(), requires_grad=False, has_fp16_weights=False)
            setattr(layer.self_attn, name, new.to("cpu"))
    return model.eval()


def torchao_model(_):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'lily-peft[dev]'")
    model = wide_llama()
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and "self_attn" in name
    )
    return model.eval()


@pytest.mark.parametrize(("make", "bits"), [(bitsandbytes_model, 4), (bitsandbytes_model, 8), (torchao_model, 8)])
@pytest.mark.parametrize("routing", ["token", "sequence", "static"])
def test_a_quantised_base_trains_saves_and_loads(tmp_path, make, bits, routing):
    config = LilyConfig(
        r=4, stride_A=2, num_B=3, routing=routing, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    # bitsandbytes' 4-bit layers repack themselves to a bfloat16 kernel when they first infer on this kind of CPU
    tolerance = 5e-3 if bits == 4 else 0.0
    base = predict(make(bits), inputs("llama"))
    model = get_peft_model(make(bits), config).eval()
    assert torch.allclose(predict(model, inputs("llama")), base, atol=tolerance, rtol=0)
    randomise(model)
    logits(model, inputs("llama")).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(make(bits), tmp_path).eval()
    assert torch.allclose(predict(back, inputs("llama")), predict(model, inputs("llama")), atol=tolerance, rtol=0)
    assert not torch.allclose(predict(model, inputs("llama")), base, atol=2e-2)
