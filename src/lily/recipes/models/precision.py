"""The precision of a recipe's computation."""

from __future__ import annotations

import torch

from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Recipe


def precision_of(recipe: Recipe | DreamBooth) -> str:
    """The recipe's precision on this machine: `auto` is bfloat16 if the hardware supports it, else float32."""
    chosen = recipe.train.precision
    if chosen != "auto":
        return chosen
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"
