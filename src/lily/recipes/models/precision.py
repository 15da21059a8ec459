"""In what precision a recipe computes."""

from __future__ import annotations

import torch

from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Recipe


def precision_of(recipe: Recipe | DreamBooth) -> str:
    """What the recipe's precision means on this machine: `auto` is bfloat16 where the hardware multiplies it."""
    chosen = recipe.train.precision
    if chosen != "auto":
        return chosen
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"
