"""Decide whether stock PEFT can read an adapter's file."""

from __future__ import annotations

import copy

from torch import nn

from lily.plan.config import LilyConfig
from lily.plan.select import matched
from lily.plan.sharing_plan import SharingPlan, resolved_stride, stock_grouping_differs
from lily.plan.specs import LINEAR
from lily.plan.uncalled_layers import ALWAYS, uncalled
from lily.plan.wrappers import plain_names


def decide_file_format(config: LilyConfig, plan: SharingPlan, model: nn.Module) -> None:
    """Set how `config` is written, so that stock PEFT reads the adapter correctly or refuses it."""
    config.resolved_stride, config.layers_by_name = resolved_stride(plan, config), plan.layers_by_name
    config.stock_refusal, config.portable_targets = None, None
    other = next((group.kind for group in plan.groups if group.kind != LINEAR), None)
    if other is not None:
        config.stock_refusal = f"adapted {other} layers"
        return
    with plain_names(model) as model:
        _decide(config, plan, model)


def _decide(config: LilyConfig, plan: SharingPlan, model: nn.Module) -> None:
    read = uncalled(dict(model.named_modules()))
    if any(read[name].remedy in ALWAYS for name in plan.slots if name in read):
        config.stock_refusal = "an adapter on a layer that is read without being called"
        return
    if not stock_grouping_differs(plan, config.target_modules or ()):
        return
    names = {group.name for group in plan.groups}
    portable = copy.copy(config)
    portable.target_modules, portable.layers_to_transform, portable.layers_pattern = names, None, None
    # Names only: a list of last names may also match modules that nobody asked for and that cannot be adapted.
    same = matched(model, portable) == set(plan.slots)
    if same and config.layers_to_transform is None and not stock_grouping_differs(plan, names):
        config.portable_targets = names
    else:
        config.stock_refusal = "a grouping of layers that stock PEFT does not make"
