"""Sequence routing on denoisers of diffusers: padding of the text, and other samples, change nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise
from peft import get_peft_model

from lily import LilyConfig
from lily.layers.attention_masks import MaskTracker
from lily.layers.mask_forms import masks_of_call
from lily.layers.mask_hooks import DenoiserHooks

diffusers = pytest.importorskip("diffusers", reason='diffusers is not installed: pip install "lily-peft[diffusion]"')

LENGTHS = (4, 6, 5)
BATCH, TOKENS, TEXT = len(LENGTHS), max(LENGTHS), 12
LAYERS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def timesteps():
    return torch.tensor([1.0, 5.0, 9.0])


def pixart():
    """Image and text meet in cross-attention, whose mask is added to the scores."""
    model = diffusers.PixArtTransformer2DModel(
        **LAYERS, in_channels=4, out_channels=8, sample_size=8, patch_size=2, cross_attention_dim=16,
        caption_channels=TEXT, norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return model, {"hidden_states": rand(BATCH, 4, 8, 8), "timestep": timesteps(), **sizes}, "encoder_attention_mask"


def hunyuan_video():
    """Single blocks read image and text in one sequence, the image first."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        **{**LAYERS, "attention_head_dim": 12}, in_channels=4, out_channels=4, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False, text_embed_dim=TEXT,
        pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    given = {"hidden_states": rand(BATCH, 4, 2, 8, 8), "pooled_projections": rand(BATCH, 8)}
    return model, {**given, "timestep": torch.tensor([1, 5, 9])}, "encoder_attention_mask"


def qwen_image():
    """Each block has the mask of the text."""
    model = diffusers.QwenImageTransformer2DModel(
        **{**LAYERS, "attention_head_dim": 16}, patch_size=2, in_channels=16, out_channels=4, joint_attention_dim=TEXT,
        guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    given = {"hidden_states": rand(BATCH, 16, 16), "img_shapes": [(1, 4, 4)] * BATCH}
    return model, {**given, "timestep": timesteps() / 10}, "encoder_hidden_states_mask"


def lumina():
    """Text without its padding and image are packed into one sequence, which the last layers read too."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=4, axes_dim_rope=(4, 4, 4), axes_lens=(64, 64, 64),
        cap_feat_dim=TEXT,
    )  # fmt: skip
    return model, {"hidden_states": rand(BATCH, 4, 8, 8), "timestep": timesteps() / 10}, "encoder_attention_mask"


def chroma():
    """The only mask is of image and text, the text first."""
    model = diffusers.ChromaTransformer2DModel(
        **LAYERS, patch_size=1, in_channels=4, num_single_layers=2, joint_attention_dim=TEXT, axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    given = {"hidden_states": rand(BATCH, 10, 4), "img_ids": rand(10, 3)}
    return model, {**given, "timestep": timesteps() / 10}, "attention_mask"


KINDS = (pixart, hunyuan_video, qwen_image, lumina, chroma)


def adapted(kind):
    torch.manual_seed(0)
    model, given, name = kind()
    # Fresh ones differ too little between tokens.
    for weight in (p for p in model.parameters() if p.ndim > 1):
        torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model = get_peft_model(model, LilyConfig(r=4, target_modules="all-linear"))
    return randomise(model, scale=0.2).eval(), given, name


def inputs(given, name, padding=0):
    """With `padding` more tokens of text, that do not count."""
    mask = (torch.arange(TOKENS + padding) < torch.tensor(LENGTHS)[:, None]).long()
    states = torch.cat((rand(BATCH, TOKENS, TEXT), 3 * rand(BATCH, padding, TEXT)), 1)
    if name == "attention_mask":
        mask = torch.cat((mask, torch.ones(BATCH, given["hidden_states"].shape[1])), 1)
        given = {**given, "txt_ids": torch.zeros(TOKENS + padding, 3)}
    mask = mask if "added_cond_kwargs" in given else mask.bool()  # PixArt subtracts it from 1
    return {**given, "encoder_hidden_states": states, name: mask}


def first(values):
    """The batch's first sample alone."""
    return {
        name: value[:1] if isinstance(value, (torch.Tensor, list)) and len(value) == BATCH else value
        for name, value in values.items()
    }


@torch.no_grad()
def sample(model, values):
    return model(**values).sample[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_texts_padding_or_on_other_samples(kind):
    model, given, name = adapted(kind)
    expected = sample(model, inputs(given, name))
    tolerance = 1e-4 * expected.std()  # rounding in float32, of other shapes
    assert (sample(model, inputs(given, name, padding=3)) - expected).abs().max() <= tolerance
    assert (sample(model, first(inputs(given, name))) - expected).abs().max() <= tolerance
    with_all = inputs(given, name)
    with_all[name] = torch.ones_like(with_all[name])
    assert (sample(model, with_all) - expected).abs().max() > 100 * tolerance


@pytest.mark.parametrize("kind", [hunyuan_video, lumina])
def test_checkpointed_blocks_are_run_again_with_the_same_masks(kind):
    found = []
    for checkpointing in (False, True):
        model, given, name = adapted(kind)
        if checkpointing:
            model.base_model.model.enable_gradient_checkpointing()
        model.train()
        model(**inputs(given, name, padding=3)).sample.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], atol=1e-5 * float(grad.abs().max())), name


def test_a_mask_that_is_as_long_as_image_and_text_is_for_the_text_that_is_attended_to_alone():
    mask = torch.tensor([[True, True, True, False]])
    same = {"hidden_states": rand(1, 4, 8), "encoder_hidden_states": rand(1, 4, 8), "encoder_attention_mask": mask}
    assert not list(masks_of_call(same))
    tracker, block = MaskTracker(), torch.nn.Identity()
    DenoiserHooks(tracker, block).enter(block, (), same)
    assert torch.equal(tracker.mask_for(same["encoder_hidden_states"]), mask)
    assert tracker.mask_for(same["hidden_states"]) is None


def test_layers_are_stored_in_less_precision_than_they_compute_in():
    model, given, name = adapted(qwen_image)
    expected = sample(model, inputs(given, name))
    model.base_model.model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    found = sample(model, inputs(given, name))
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()  # the weights are rounded to 8 bits
    stored = {parameter.dtype for name, parameter in model.named_parameters() if "lily_" in name}
    assert stored == {torch.float32}  # as LoRA's, routers too
    assert "_skip_layerwise_casting_patterns" not in vars(model.base_model.model)
