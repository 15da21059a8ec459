"""The optimizer groups of a recipe: what has another learning rate is in another group."""

from __future__ import annotations

from typing import Any

from torch import nn

from lily.optim import PARTS, trained_parts
from lily.recipes.methods.configs import HEAD, learning_rate, learning_rates, ratios_of
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Recipe

ADAPTER = "adapter"


def parameter_groups(recipe: Recipe | DreamBooth, model: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters: the adapter, by parts if these have separate rates, and a new head.

    Without ratios the adapter is one group without a name, as in checkpoints of earlier versions.
    """
    rates, ratios = {ADAPTER: learning_rate(recipe), **learning_rates(recipe)}, ratios_of(recipe)
    split = bool(ratios)
    groups: dict[str, list[nn.Parameter]] = {}
    for name, part, p in trained_parts(model, **ratios):
        groups.setdefault(HEAD if "modules_to_save" in name else part if split else ADAPTER, []).append(p)
    return [
        {**({"name": part} if split else {}), "params": groups[part], "lr": rates[part]}
        for part in (ADAPTER, *PARTS, HEAD)
        if part in groups
    ]
