"""Methods of PEFT besides Lily and LoRA: their configuration, checked, at the rank that a budget pays for.

Sizes are counted on a model without weights, so that no method needs a formula of its own here.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from lily.tuner.registry import register, unregister

# What the recipe says itself, in words of its own.
ELSEWHERE = {"target_modules": "targets", "exclude_modules": "exclude", "target_parameters": "target_parameters",
             "task_type": "task", "base_model_name_or_path": "model"}  # fmt: skip
# PEFT's option for how much the update counts, by the names that its classes have for it.
SCALES = ("lora_alpha", "alpha", "scaling")


@dataclass(frozen=True)
class Wish:
    """What a recipe asks of a method of PEFT.

    Attributes:
        peft_type: its name, in any case.
        r: rank, `equal`, or None: as the method has it.
        options: of the method's own configuration class.
        targets: modules, in PEFT's conventions.
        exclude: modules to leave out.
        parameters: parameters to adapt too.
        task_type: PEFT's name of the task.
        heads: modules to train and save whole.
    """

    peft_type: str
    r: int | str | None
    options: Mapping[str, Any]
    targets: Any
    exclude: list[str] | None
    parameters: list[str] | None
    task_type: str | None
    heads: list[str] | None


def types() -> list[str]:
    """PEFT's methods, by the names that recipes give them."""
    ours = (PeftType.LILY, EXTENDED_TYPE)
    return sorted(getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind not in ours)


def config_class(peft_type: str) -> type[PeftConfig]:
    """PEFT's configuration class of a method.

    Raises:
        LilyError: if it has none of this name.
    """
    name = peft_type.upper()
    if name == "LILY":
        raise LilyError("peft_type LILY: write method: lily, or method: stock-lily for PEFT's own")
    if name not in types():
        near = difflib.get_close_matches(name, types(), n=2, cutoff=0.5)
        raise LilyError(
            f"peft_type {peft_type}: PEFT {peft.__version__} has no such method; "
            + (f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(types())}")
        )
    found: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    return found


def options_of(kind: type[PeftConfig]) -> set[str]:
    """Names of a configuration class's options."""
    return {f.name for f in dataclasses.fields(kind) if f.init}


def config_of(wish: Wish, model: nn.Module, budget: int, most: int) -> PeftConfig:
    """A method's configuration; with `r: equal` the largest rank that the budget pays for.

    Args:
        wish: what the recipe asks.
        model: the base model; the meta device will do.
        budget: parameters; a method that cannot be that small has more, one whose size has no rank what it has.
        most: no rank above it is looked at.

    Raises:
        LilyError: if the class does not know an option or refuses a value.
    """
    kind = config_class(wish.peft_type)
    known = options_of(kind)
    for name in wish.options:
        if name in ELSEWHERE:
            raise LilyError(f"{name}: the recipe says this itself, with {ELSEWHERE[name]}; remove it here")
        if name not in known or name.startswith("_"):
            near = difflib.get_close_matches(name, known - set(ELSEWHERE), n=2, cutoff=0.5)
            raise LilyError(
                f"{name}: {kind.__name__} has no such option; "
                + (f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(known))}")
            )
    given = {"target_modules": wish.targets, "exclude_modules": wish.exclude, "target_parameters": wish.parameters,
             "modules_to_save": wish.heads}  # fmt: skip
    if wish.parameters and "target_parameters" not in known:
        raise LilyError(f"{wish.peft_type.upper()} does not adapt parameters; remove target_parameters")
    fixed = {name: value for name, value in given.items() if name in known and value is not None}

    def of_rank(r: int | None) -> PeftConfig:
        rank = {} if r is None else {rank_option(kind): r}
        with _in_our_words(kind.__name__):
            return kind(task_type=wish.task_type, **fixed, **rank, **wish.options)

    if isinstance(wish.r, int):
        if "r" not in known:
            raise LilyError(f"r: {kind.__name__} has no rank; remove it")
        return of_rank(wish.r)
    if wish.r is None and not _grows(wish, kind, model, of_rank):
        return of_rank(None)
    if "r" not in known:
        raise LilyError(f"r: {kind.__name__} has no rank to choose; remove it")
    return of_rank(largest_rank(model, of_rank, budget, most))


def rank_option(kind: type[PeftConfig]) -> str:
    """What a configuration class calls the rank that it starts from."""
    return "init_r" if "init_r" in options_of(kind) else "r"


def _grows(wish: Wish, kind: type[PeftConfig], model: nn.Module, of_rank: Callable[[int | None], PeftConfig]) -> bool:
    """Whether a larger rank means more parameters (of OFT and RandLoRA it means fewer)."""
    if "r" not in options_of(kind):
        return False
    try:
        return count(model, of_rank(8)) > count(model, of_rank(4))
    except LilyError:
        return False


def widest(layers: Sequence[ModuleSpec]) -> int:
    """The largest side of any layer: no rank means anything beyond it."""
    return max(max(m.in_features, m.out_features) for m in layers)


def largest_rank(model: nn.Module, of_rank: Callable[[int], PeftConfig], budget: int, most: int) -> int:
    """The largest rank with no more than `budget` parameters, at least 1; found by bisection on the counted sizes.

    Args:
        model: the base model; the meta device will do.
        of_rank: the configuration of a rank.
        budget: parameters.
        most: no rank above it is looked at.
    """
    low, high = 1, 2
    while high <= most and count(model, of_rank(high)) <= budget:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if count(model, of_rank(middle)) <= budget:
            low = middle
        else:
            high = middle
    return low


def count(model: nn.Module, config: PeftConfig) -> int:
    """Trainable parameters of an adapter, a new head aside, on a copy of the model.

    Raises:
        LilyError: if PEFT cannot put it on this model.
    """
    config = copy.deepcopy(config)
    with _in_our_words(type(config).__name__):
        adapted = get_peft_model(copy.deepcopy(model), config)
    return adapter_parameters(adapted)


def adapter_parameters(model: nn.Module) -> int:
    """Trainable parameters but those of modules that are trained whole."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name)


def stock_config(config: LilyConfig, plan: SharingPlan, model: nn.Module, heads: list[str] | None) -> PeftConfig:
    """PEFT's own configuration of the same sharing.

    It has one `stride_A` for all groups; where `num_A` means several, it gets the largest, so no more parameters. Its
    groups are what one entry of `target_modules` matches, so it is given the modules' own last names, as ours groups.

    Args:
        config: the recipe's Lily.
        plan: what it shares.
        model: the base model; the meta device will do.
        heads: modules to train and save whole.

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
    }
    if wrong := [name for name, given in beyond.items() if given]:
        raise LilyError(f"stock Lily has no {wrong[0]}; remove it, or take method: lily")
    names = sorted({_last(m) for m in plan.slots})
    return peft.LilyConfig(
        r=config.r,
        stride_A=max(g.stride for g in plan.groups),
        num_B=config.num_B,
        scaling=config.scaling,
        target_modules=names,
        exclude_modules=[m for m, _ in model.named_modules() if _last(m) in names and m not in plan.slots] or None,
        task_type=config.task_type,
        modules_to_save=heads,
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@contextmanager
def implementation(recipe: Any) -> Iterator[None]:
    """Within: PEFT makes of a Lily configuration what the recipe's method means, its own model for `stock-lily`."""
    if recipe.method != "stock-lily":
        yield
        return
    unregister()
    try:
        yield
    finally:
        register()


@contextmanager
def _in_our_words(name: str) -> Iterator[None]:
    try:
        yield
    except LilyError:
        raise
    except Exception as error:  # each method has its own ways to refuse
        said = " ".join(str(error).split()) or type(error).__name__
        raise LilyError(f"PEFT refuses this {name}: {said}") from None
