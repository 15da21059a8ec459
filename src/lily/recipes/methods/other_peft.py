"""Methods of PEFT besides Lily and LoRA: their configuration, checked, at the largest rank within a budget.

Sizes are counted on a model without weights, so no method needs a formula.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import peft
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn

from lily.errors import LilyError
from lily.plan.config import EXTENDED_TYPE, LilyConfig
from lily.plan.sharing_plan import SharingPlan
from lily.plan.specs import ModuleSpec
from lily.recipes.spec.methods import Peft
from lily.tuner.registry import register, unregister

# Option of PEFT that a recipe sets with another key -> that key.
ELSEWHERE = {"target_modules": "targets", "exclude_modules": "exclude", "target_parameters": "target_parameters",
             "task_type": "task", "base_model_name_or_path": "model"}  # fmt: skip
# Names of the option that scales the update, in PEFT's classes.
SCALES = ("lora_alpha", "alpha", "scaling")


def types() -> list[str]:
    """Names of PEFT's methods, as recipes have them."""
    ours = (PeftType.LILY, EXTENDED_TYPE)
    return sorted(getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind not in ours)


def config_class(peft_type: str) -> type[PeftConfig]:
    """PEFT's configuration class of a method.

    Raises:
        LilyError: if PEFT has no method of this name.
    """
    name = peft_type.upper()
    if name == "LILY":
        raise LilyError("peft_type LILY: write method: lily, or method: stock-lily for the Lily of PEFT")
    if name not in types():
        near = difflib.get_close_matches(name, types(), n=2, cutoff=0.5)
        raise LilyError(
            f"peft_type {peft_type}: PEFT {peft.__version__} has no such method; "
            + (f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(types())}")
        )
    kind: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    return kind


def options_of(kind: type[PeftConfig]) -> set[str]:
    """Names of a configuration class's options."""
    return {f.name for f in dataclasses.fields(kind) if f.init}


def config_of(method: Peft, common: Mapping[str, Any], model: nn.Module, budget: int, max_rank: int) -> PeftConfig:
    """A method's configuration; with `r: equal`, of the largest rank within the budget.

    Args:
        method: the recipe's section.
        common: options that most methods have, such as `target_modules`, from other keys of the recipe.
        model: the base model; may be on the meta device.
        budget: number of parameters; a method has more only if rank 1 is larger, or if it has no rank.
        max_rank: upper bound on the rank.

    Raises:
        LilyError: if the class has no such option or rejects a value.
    """
    kind = config_class(str(method.peft_type))
    allowed = options_of(kind)
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    for name, value in method.options.items():
        if isinstance(value, bool) and type(defaults.get(name)) in (int, float):
            raise LilyError(f"{name}: expected a number, got {str(value).lower()}")
        if name in ELSEWHERE:
            raise LilyError(f"{name}: the recipe's key for this is {ELSEWHERE[name]}; remove it here")
        if name not in allowed or name.startswith("_"):
            near = difflib.get_close_matches(name, allowed - set(ELSEWHERE), n=2, cutoff=0.5)
            raise LilyError(
                f"{name}: {kind.__name__} has no such option; "
                + (f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(allowed))}")
            )
    if common["target_parameters"] and "target_parameters" not in allowed:
        raise LilyError(f"{str(method.peft_type).upper()} does not adapt parameters; remove target_parameters")
    fixed = {name: value for name, value in common.items() if name in allowed and value is not None}

    def of_rank(r: int | None) -> PeftConfig:
        rank = {} if r is None else {rank_option(kind): r}
        with _peft_errors(kind.__name__):
            return kind(**fixed, **rank, **method.options)

    if method.r is None and not ("r" in allowed and _grows(model, of_rank)):
        return of_rank(None)
    if "r" not in allowed:
        raise LilyError(f"r: {kind.__name__} has no rank; remove it")
    return of_rank(method.r if isinstance(method.r, int) else largest_rank(model, of_rank, budget, max_rank))


def rank_option(kind: type[PeftConfig]) -> str:
    """Name of the option that sets the initial rank."""
    return "init_r" if "init_r" in options_of(kind) else "r"


def _grows(model: nn.Module, of_rank: Callable[[int | None], PeftConfig]) -> bool:
    """Whether a larger rank means more parameters (for OFT and RandLoRA it means fewer)."""
    try:
        return count(model, of_rank(8)) > count(model, of_rank(4))
    except LilyError:
        return False


def widest(layers: Sequence[ModuleSpec]) -> int:
    """The largest side of any layer: no larger rank changes anything."""
    return max(max(m.in_features, m.out_features) for m in layers)


def largest_rank(model: nn.Module, of_rank: Callable[[int], PeftConfig], budget: int, max_rank: int) -> int:
    """The largest rank with no more than `budget` parameters, at least 1; bisects over counted sizes."""
    low, high = 1, 2
    while high <= max_rank and count(model, of_rank(high)) <= budget:
        low, high = high, 2 * high
    high = min(high, max_rank + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if count(model, of_rank(middle)) <= budget:
            low = middle
        else:
            high = middle
    return low


def count(model: nn.Module, config: PeftConfig) -> int:
    """Trainable parameters of an adapter without a new head, counted on a copy of the model.

    Raises:
        LilyError: if PEFT cannot add it to this model.
    """
    config = copy.deepcopy(config)
    with _peft_errors(type(config).__name__):
        adapted = get_peft_model(copy.deepcopy(model), config)
    return adapter_parameters(adapted)


def adapter_parameters(model: nn.Module) -> int:
    """Trainable parameters, except those of modules that are trained whole."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name)


def stock_config(config: LilyConfig, plan: SharingPlan, model: nn.Module, heads: list[str] | None) -> PeftConfig:
    """PEFT's own configuration of the same sharing.

    Stock Lily has one `stride_A` for all groups; if `num_A` implies several, the largest is used, so that it has
    no more parameters. It groups by entry of `target_modules`, so these are the modules' last names.

    Raises:
        LilyError: if stock Lily cannot express it.
    """
    if config.num_B == 1:
        raise LilyError("stock Lily needs num_B of 2 or more")
    beyond = {
        "activation": config.activation != "none",
        "dropout": bool(config.dropout),
        "settle": config.settled is not None,
        "target_parameters": bool(config.target_parameters),
        "slices": bool(config.target_slices),
        "parallel": bool(config.parallel_modules),
        "groups": bool(config.group_options or config.rank_pattern),
        "shared_router": config.shared_router,
        "distinct": config.distinct != "none",
        "gain": config.gain != "none",
        "own_r": bool(config.own_r),
        "init_weights": isinstance(config.init_weights, str),
    }
    if wrong := [name for name, is_set in beyond.items() if is_set]:
        raise LilyError(f"stock Lily has no {wrong[0]}; remove it, or use method: lily")
    names = sorted({_last(m) for m in plan.slots})
    return peft.LilyConfig(
        r=config.r,
        stride_A=max(g.stride for g in plan.groups),
        num_B=config.num_B,
        scaling=config.scaling,
        init_weights=config.init_weights,
        target_modules=names,
        exclude_modules=[m for m, _ in model.named_modules() if _last(m) in names and m not in plan.slots] or None,
        task_type=config.task_type,
        modules_to_save=heads,
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@contextmanager
def implementation(recipe: Any) -> Iterator[None]:
    """Within: with method `stock-lily`, a Lily configuration builds PEFT's own model instead of ours."""
    if recipe.method != "stock-lily":
        yield
        return
    unregister()
    try:
        yield
    finally:
        register()


@contextmanager
def _peft_errors(name: str) -> Iterator[None]:
    try:
        yield
    except LilyError:
        raise
    except Exception as error:  # the classes raise errors of many types
        text = " ".join(str(error).split()) or type(error).__name__
        raise LilyError(f"PEFT rejects this {name}: {text}") from None
