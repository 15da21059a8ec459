"""Refuse a layer that another adapter of the model adapts differently: whole, by its slices, or by a parameter."""

from __future__ import annotations

from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lily.errors import LilyError
from lily.layers.layer import LilyLayer
from lily.layers.parameter import Parameter
from lily.layers.slice import Slice
from lily.plan.select import adapted_twice
from lily.plan.specs import PARAMETERS, SLICE, ModuleSpec


def check_targets(model: nn.Module, specs: Sequence[ModuleSpec]) -> None:
    """Compare the targets of a new adapter with the adapted layers of the model.

    Args:
        model: the base model, or one that already carries adapters.
        specs: targets of the new adapter; `lily.plan.select` has checked them against each other.

    Raises:
        LilyError: if a layer is already adapted differently.
    """
    for spec in specs:
        module = model.get_submodule(spec.path)
        is_parameter = spec.kind in PARAMETERS
        if not isinstance(module, LilyLayer):
            if is_parameter and isinstance(module, BaseTunerLayer):
                raise adapted_twice(spec.path)
            continue
        if isinstance(module, Parameter) != is_parameter:
            raise adapted_twice(spec.path)
        if not is_parameter and isinstance(module, Slice) != (spec.kind == SLICE):
            raise LilyError(
                f"{spec.path} is adapted as a whole by one adapter and by its slices by another; give both the same "
                "target_slices"
            )
