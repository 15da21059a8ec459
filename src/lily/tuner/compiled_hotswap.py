"""Prepare a model, before it is compiled, for adapters that replace one another without recompilation.

`lily.tuner.replacements` replaces PEFT's function, which knows LoRA alone, by `prepare`.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap
from torch import nn

from lily.errors import LilyError
from lily.layers.bank import LilyBank, banks_in
from lily.layers.find import layers_of, watch_masks
from lily.layers.fixed_shape import Shape, shape_of
from lily.layers.layer import LilyLayer
from lily.plan.config import LilyConfig
from lily.plan.options import DYNAMIC
from lily.plan.specs import PARAMETERS
from lily.plan.wrappers import plain_names
from lily.tuner.hotswap import check_free
from lily.tuner.routing import decide_routing

_stock_prepare = hotswap.prepare_model_for_compiled_hotswap


@functools.wraps(_stock_prepare)
def prepare(
    model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """PEFT's `prepare_model_for_compiled_hotswap`, for Lily's adapters too.

    Args:
        model: with the first adapter, not yet compiled.
        target_rank: the largest rank of the adapters, own ranks included; default: those of the model's.
        config: configurations of adapters that will be swapped in, one or a dictionary; they say how many experts and
            which routing to compile for. Those of LoRA are changed as by PEFT.
        check_compiled: what to do about a model that is compiled already: `error`, `warn` or `ignore`.

    Raises:
        LilyError: if `target_rank` is below a rank of the model's, the adapters cannot replace one another, or the
            model is compiled already.
    """
    given = list(config.values()) if isinstance(config, dict) else [] if config is None else [config]
    others = {str(i): own for i, own in enumerate(given) if not isinstance(own, peft.LilyConfig)}
    found = banks_in(model)
    if not found or any(isinstance(module, LoraLayer) for module in model.modules()):
        _stock_prepare(model, target_rank=target_rank, config=others or None, check_compiled=check_compiled)
    else:
        _check_compiled(model, check_compiled)
    with plain_names(model) as inner:
        wanted = [LilyConfig.from_stock(own) for own in given if isinstance(own, peft.LilyConfig)]
        shapes = [
            (layer, adapter, shape)
            for root, bank in banks_in(inner)
            for adapter in bank.plans
            for layer, shape in _shapes_to_fix(inner, root, bank, adapter, wanted, target_rank)
        ]
    for layer, adapter, shape in shapes:
        layer.fix_shape(adapter, shape)
    for root, _ in found:
        watch_masks(root)


def _check_compiled(model: nn.Module, check_compiled: str) -> None:
    if check_compiled not in ("error", "warn", "ignore"):
        raise LilyError(f"check_compiled={check_compiled!r} is not known; expected error, warn or ignore")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        if check_compiled == "error":
            raise LilyError("the model is compiled already; call prepare_model_for_compiled_hotswap before that")
        if check_compiled == "warn":
            warnings.warn("the model is compiled already, so preparing it recompiles it", stacklevel=4)


def _shapes_to_fix(
    model: nn.Module, root: nn.Module, bank: LilyBank, adapter: str, wanted: list[LilyConfig], target_rank: int | None
) -> Iterator[tuple[LilyLayer, Shape]]:
    """Each layer of an adapter, with the shape into which it and adapters of the configurations `wanted` fit."""
    check_free(root, adapter)
    plan, layers = bank.plans[adapter], layers_of(root)
    configs: Any = model.peft_config
    config: LilyConfig = configs[adapter]
    if config.settled not in (None, 1):
        raise LilyError(f"the routing of adapter {adapter!r} is settling; prepare the model when it has settled")
    for name in plan.slots:
        group = plan.group_of(name)
        own = shape_of(group, config, layers[name].routing_for)
        if group.conv_groups > 1:
            raise LilyError(
                f"{name} is a convolution with groups={group.conv_groups}, which divide the ranks, so they cannot be "
                "padded for compiled code; leave it out with exclude_modules, or hot-swap without preparing the model"
            )
        if target_rank is not None and target_rank < own.r:
            raise LilyError(f"target_rank={target_rank} is below the rank {own.r} of adapter {adapter!r} on {name}")
        options = [(own.num_B, own.routing)]
        if group.kind not in PARAMETERS:
            options += [(c.options_of(group.name).num_B, layers[name].routing_for(_routing(c, root))) for c in wanted]
        dynamic = [(num_B, routing) for num_B, routing in options if num_B > 1 and routing in DYNAMIC]
        routings = sorted({routing for _, routing in dynamic})
        if len(routings) > 1:
            raise LilyError(
                f"adapters of routing {' and '.join(routings)} cannot replace one another in a compiled model; "
                "collapse those of one of them"
            )
        num_B = max((num_B for num_B, _ in dynamic), default=1)
        yield layers[name], Shape(target_rank or own.r, num_B, routings[0] if routings else "static", own.activation)


def _routing(config: LilyConfig, root: nn.Module) -> str:
    """The routing that a configuration has on a model."""
    config = copy.copy(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decide_routing(config, root)
    return "static" if config.settled == 1 else str(config.routing)
