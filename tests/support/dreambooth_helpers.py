"""Very small random pipelines of each kind, saved to folders, and a subject drawn by code."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import torch
from recipes_helpers import write_recipe

from lily.recipes import loader
from lily.recipes.spec.dreambooth import DreamBooth

RESOLUTION = 16
KINDS = ("sdxl", "sd3", "flux")
SMALL: dict[str, Any] = {"width": 16, "size": RESOLUTION // 4}


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    from lily.recipes.dreambooth import tiny

    words = tiny.tokenizer()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0)]
    pieces += [(piece, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz" for piece in (letter, "▁" + letter)]
    more = T5Tokenizer(vocab=pieces, extra_ids=0)
    torch.manual_seed(5)
    config = T5Config(vocab_size=len(more), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = FluxTransformer2DModel(
        in_channels=4 * tiny.CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=tiny.WIDTH,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny.autoencoder(0, 8),
        text_encoder=tiny.text_encoder(words, projected=False, seed=1),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(config).eval(),
        tokenizer_2=more,
        transformer=transformer.eval(),
    )


def save(kind: str, folder: Path) -> Path:
    from lily.recipes.dreambooth import tiny

    pipe = flux() if kind == "flux" else getattr(tiny, kind)(vae=tiny.autoencoder(0, 8), **SMALL)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def draw_subject(folder: Path, count: int = 3) -> Path:
    """A coloured square on a ground of another colour, at another place each time."""
    from PIL import Image, ImageDraw

    folder.mkdir()
    for number in range(count):
        ground = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(number / count, 0.6, 0.9))
        image = Image.new("RGB", (24, 20), ground)
        ImageDraw.Draw(image).rectangle((4 + number, 4, 12 + number, 14), fill=(200, 30, 30))
        image.save(folder / f"{number}.png")
    return folder


def values(pipeline: Path, subject: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "square",
        "task": "dreambooth",
        "model": {"path": str(pipeline), "max_tokens": 4},
        "subject": {"images": str(subject), "prompt": "a photo of sks toy", "resolution": RESOLUTION},
        "lily": {"r": 4, "num_A": 2, "num_B": 2},
        "train": {"max_steps": 4, "gradient_accumulation": 2, "learning_rate": 1e-2, "precision": "float32"},
        "validation": {"images": 2, "every": 2, "times": 4, "steps": 2},
        "output": str(output),
        **changes,
    }


def recipe(folder: Path, given: dict[str, Any], *overrides: str) -> DreamBooth:
    found = loader.load_any(write_recipe(folder, given), list(overrides))
    assert isinstance(found, DreamBooth)
    return found
