"""Draw images with a pipeline, always from the same noise, and write them as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lily.io.atomic import new_file
from lily.recipes.dreambooth.families import Family, Text
from lily.recipes.spec.dreambooth import Validation

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.no_grad()
def draw(
    pipe: Any, family: Family, text: Text, empty: Text, resolution: int, settings: Validation, images: int, seed: int
) -> list[Image]:
    """Images for one prompt: `text` has its row, and `empty` that of the empty prompt, for guidance.

    The pipeline's scheduler is left unchanged.
    """

    def in_dtype(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # a model that accelerate has prepared returns float32, which a half-precision autoencoder does not accept
        return {"latents": tensors["latents"].to(text.tokens.dtype)}

    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    negative = {"negative_prompt_embeds": empty.tokens, "negative_pooled_prompt_embeds": empty.pooled}
    drawn: list[Image] = []
    try:
        for number in range(images):  # one at a time: each has a separate generator, and memory is that of one
            drawn += pipe(
                prompt_embeds=text.tokens,
                pooled_prompt_embeds=text.pooled,
                **(negative if family.guided_by_negative else {}),
                height=resolution,
                width=resolution,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=torch.Generator().manual_seed(seed + number),
                callback_on_step_end=in_dtype,
            ).images
    finally:
        pipe.scheduler = scheduler
    return drawn


def write_grid(images: list[Image], file: Path, smallest: int = 256) -> None:
    """Write images of one size side by side as one PNG, atomically; an existing file is replaced.

    Those narrower than `smallest` pixels are enlarged by an integer factor, to at most that width.
    """
    from PIL import Image as Images

    wide, high = images[0].size
    times = max(1, smallest // wide)
    grid = Images.new("RGB", (len(images) * wide * times, high * times))
    for number, image in enumerate(images):
        shown = image.resize((wide * times, high * times), Images.Resampling.NEAREST)
        grid.paste(shown, (number * wide * times, 0))
    with new_file(file, overwrite=True) as new:
        grid.save(new, format="PNG")
