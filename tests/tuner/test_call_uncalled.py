"""Layers that their parent reads without calling: what is refused, and what is made to act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import randomise
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import WavLMConfig, WavLMModel

import lily
from lily import LilyConfig
from lily.deploy.readers import TARGETS, check_readable
from lily.errors import LilyError
from lily.plan.uncalled_layers import uncalled
from lily.tuner import call_uncalled
from lily.tuner.adapter import find

pytestmark = pytest.mark.sample(every=10)

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
TIMM = {
    "beit": ("beit_base_patch16_224", {**SMALL, "img_size": 16, "patch_size": 8}),
    "beitv2": ("beitv2_base_patch16_224", {**SMALL, "img_size": 16, "patch_size": 8}),
    "eva": ("eva_giant_patch14_224", {**SMALL, "img_size": 16, "patch_size": 8}),
    "eva02": ("eva02_tiny_patch14_224", {**SMALL, "img_size": 16, "patch_size": 8}),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "num_classes": 3},
    ),
}


@pytest.mark.parametrize("target", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_the_projections_that_wavlm_hands_to_torch_are_refused(target):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.device("meta"):
        model = WavLMModel(WavLMConfig(**sizes, conv_dim=(8,), conv_kernel=(4,), conv_stride=(4,)))
    with pytest.raises(LilyError, match=rf"{target} belongs to WavLMAttention, which reads its weight in torch's"):
        lily.select_modules(model, LilyConfig(target_modules=[target]))
    with pytest.warns(UserWarning, match="leaves out .*WavLMAttention reads the weight in torch's"):
        every = lily.select_modules(model, LilyConfig(target_modules="all-linear"))
    names = {m.name.rpartition(".")[2] for m in every}
    assert "intermediate_dense" in names
    assert target not in names


def of_timm(kind: str) -> nn.Module:
    timm = pytest.importorskip("timm", reason="needs timm, which the vision environment has: make test-vision")
    name, options = TIMM[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.5 if "head" in name or p.ndim == 1 else 0.1)  # large enough for an adapter to show
    return model


def output(model: nn.Module, kind: str) -> torch.Tensor:
    size = TIMM[kind][1]["img_size"]
    with torch.no_grad():
        return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("options", [{"target_modules": ["qkv"]}, {"target_slices": {"qkv": ["k", "v"]}}], ids=str)
@pytest.mark.parametrize("kind", sorted(TIMM))
def test_an_adapter_on_the_qkv_of_timm_acts_and_leaves_as_it_came(kind, options, tmp_path):
    base = of_timm(kind)
    before = output(base, kind)
    model = get_peft_model(base, LilyConfig(r=4, num_B=2, routing="token", **options))
    torch.testing.assert_close(output(model, kind), before)
    randomise(model)
    after = output(model, kind)
    assert (after - before).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(output(model, kind), before)
    model.train()(torch.randn(2, 3, *2 * [TIMM[kind][1]["img_size"]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    torch.testing.assert_close(output(PeftModel.from_pretrained(of_timm(kind), tmp_path).eval(), kind), after)
    assert torch.equal(output(model.unload().eval(), kind), before)


def test_what_other_readers_of_timm_would_do_nothing_with_is_refused_them():
    for options in ({"target_modules": ["qkv"]}, {"target_slices": {"qkv": ["v"]}}):
        model = get_peft_model(of_timm("beit"), LilyConfig(r=4, num_B=1, **options))
        assert model.peft_config["default"].stock_refusal
        with pytest.raises(LilyError, match=r"no reader of a LoRA applies one to blocks.0.attn.qkv.*: Attention reads"):
            check_readable("peft", TARGETS["peft"], find(model), {})


def test_a_lora_on_the_qkv_of_timm_acts_where_the_projections_are_called():
    model = of_timm("beit")
    call_uncalled.call_projections(model)
    before = output(model, "beit")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False))
    assert (output(adapted, "beit") - before).abs().max() > 1e-2


def test_attention_of_timm_that_has_no_choice_is_refused():
    attention: Any = type("Attention", (nn.Module,), {"__module__": "timm.models.beit", "forward": lambda self, x: x})()
    attention.qkv, attention.q_bias = nn.Linear(4, 12, bias=False), nn.Parameter(torch.zeros(4))
    model = nn.ModuleDict({"attn": attention})
    with pytest.raises(LilyError, match=r"attn.qkv belongs to Attention, which reads its weight in a product, without"):
        lily.select_modules(model, LilyConfig(target_modules=["qkv"]))
    attention.qkv_bias_separate = False
    assert uncalled(dict(model.named_modules()))["attn.qkv"].remedy == "separated"
    attention.qkv_bias_separate = True  # as the model itself was made
    assert not uncalled(dict(model.named_modules()))
