"""`set_scale` and its kin, and the calls of PEFT and diffusers that use them, as on LoRA's layers."""

from __future__ import annotations

import pytest
import torch
from helpers import build, randomise
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer

from lily import LilyConfig, LilyError
from lily.layers.layer import LilyLayer

IDS = torch.arange(12).reshape(2, 6)
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(**options):
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "down_proj"], "scaling": 0.5, **options}
    return randomise(get_peft_model(build("llama"), LilyConfig(r=4, num_A=2, num_B=2, **options))).eval()


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def every(model, call, *args):
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):  # as diffusers does, the bank too
            getattr(layer, call)(*args)


@pytest.mark.parametrize("routing", ["token", "sequence", "static"])
def test_scales_multiply_and_are_restored(routing):
    model, twice = adapted(routing=routing), adapted(routing=routing, scaling=1.0)
    before, doubled = output(model), output(twice)
    every(model, "scale_layer", 2.0)
    assert torch.allclose(output(model), doubled, atol=1e-5)
    every(model, "unscale_layer", 2.0)
    assert torch.equal(output(model), before)
    every(model, "scale_layer", 3.0)
    every(model, "unscale_layer")
    assert torch.equal(output(model), before)
    every(model, "set_scale", "default", 2.0)
    every(model, "set_scale", "default", 2)  # of the configured scale, not of the present one
    every(model, "set_scale", "absent", 5.0)
    assert torch.allclose(output(model), doubled, atol=1e-5)
    every(model, "set_scale", "default", 0.0)
    with model.disable_adapter():
        base = output(model)
    assert torch.allclose(output(model), base, atol=1e-6)


@pytest.mark.parametrize("routing", ["token", "static"])
def test_an_entry_of_scaling_can_be_assigned_as_on_loras_layers(routing):
    model, twice = adapted(routing=routing), adapted(routing=routing, scaling=1.0)
    doubled = output(twice)
    layers = [layer for layer in model.modules() if isinstance(layer, LilyLayer)]
    for layer in layers:
        layer.scaling["default"] *= 2
    assert torch.allclose(output(model), doubled, atol=1e-5)
    scales, ranks = layers[0].scaling, layers[0].r
    assert (dict(scales), dict(ranks)) == ({"default": 1.0}, {"default": 4})
    with pytest.raises(LilyError, match="no adapter 'other' on this layer"):
        scales["other"] = 1.0
    with pytest.raises(LilyError, match="not a finite number"):
        scales["default"] = float("nan")
    model.delete_adapter("default")
    assert (dict(scales), dict(ranks)) == ({}, {})


def test_scales_change_the_active_adapters_alone():
    model = adapted()
    model.add_adapter("other", LilyConfig(r=2, num_A=1, num_B=1, target_modules=["q_proj"], scaling=0.25))
    every(model, "scale_layer", 2.0)
    layer = next(m for m in model.modules() if isinstance(m, LilyLayer) and "other" in m.settings)
    assert layer.scaling == {"default": 1.0, "other": 0.25}


def test_rescaling_is_as_for_lora_and_ends_whatever_happens():
    model, doubled = adapted(), output(adapted(scaling=1.0))
    before = output(model)
    with rescale_adapter_scale(model, 2):
        assert torch.allclose(output(model), doubled, atol=1e-5)
    with pytest.raises(RuntimeError), rescale_adapter_scale(model, 0.0):
        raise RuntimeError
    assert torch.equal(output(model), before)
    with pytest.raises(TypeError, match="multiplier should be of type float"), rescale_adapter_scale(model, "a"):
        pass
    lora = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with rescale_adapter_scale(lora, 0.5):
        assert next(m for m in lora.modules() if hasattr(m, "lora_A")).scaling == {"default": 2.0}
    with pytest.raises(ValueError, match="only supported for models"), rescale_adapter_scale(build("llama"), 1.0):
        pass


def test_a_merged_update_has_the_scale_and_leaves_every_bit():
    model, twice = adapted(routing="static"), adapted(routing="static", scaling=1.0)
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer.weight" in n}
    every(model, "scale_layer", 2.0)
    every(model, "merge")
    assert torch.allclose(output(model), output(twice), atol=1e-4)
    every(model, "unscale_layer")
    every(model, "unmerge")
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


@pytest.mark.parametrize("scale", ["1", True, float("nan"), float("inf"), None])
def test_what_is_no_scale_is_refused(scale):
    with pytest.raises(LilyError, match="is not a finite number"):
        every(adapted(), "scale_layer", scale)


def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"block_out_channels": (32, 32), "layers_per_block": 1, "cross_attention_dim": 16}
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    return diffusers.UNet2DConditionModel(sample_size=8, norm_num_groups=8, attention_head_dim=8, **blocks, **kinds)


def painted(model, **kwargs):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16), **kwargs).sample


def of_unet(scaling):
    model = unet()
    torch.manual_seed(0)
    options = {"target_modules": ["to_q", "to_v"], "routing": "static", "scaling": scaling}
    model.add_adapter(LilyConfig(r=4, num_A=2, num_B=2, **options), "a")
    return randomise(model).eval()


def test_diffusers_scales_by_its_own_arguments():
    model, doubled, before = of_unet(0.5), painted(of_unet(1.0)), painted(of_unet(0.5))
    assert (doubled - before).abs().max() > 1e-3
    assert torch.allclose(painted(model, cross_attention_kwargs={"scale": 2.0}), doubled, atol=1e-5)
    assert torch.equal(painted(model), before)
    model.set_adapters("a", 2.0)
    assert torch.allclose(painted(model), doubled, atol=1e-5)
    model.set_adapters("a", 1.0)
    assert torch.equal(painted(model), before)
    model.set_adapters("a", {"down": 0.0, "mid": 0.0, "up": 0.0})  # weights by block
    assert torch.equal(painted(model), painted(unet().eval().requires_grad_(False)))
    model.set_adapters("a", 1.0)
    model.fuse_lora(lora_scale=2.0)
    assert torch.allclose(painted(model), doubled, atol=1e-4)
    model.unfuse_lora()
