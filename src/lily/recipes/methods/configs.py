"""The PEFT configuration of a recipe's method, computed on a model without weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from lily.checkpoint.heads import HEADS
from lily.errors import LilyError
from lily.optim import multiples_of
from lily.plan import decide as plan
from lily.plan.budget import equal_lora_rank, parse_count
from lily.plan.config import LilyConfig
from lily.plan.decide import Decided, Step
from lily.plan.select_parts import whole_layers
from lily.plan.sharing_plan import SAVED_HEADS, SharingPlan
from lily.plan.specs import PARAMETERS, ModuleSpec
from lily.recipes.methods import other_peft
from lily.recipes.models.load import heads_of
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.locations import Key, located
from lily.recipes.spec.methods import Group
from lily.recipes.spec.schema import Recipe

# Option of LilyConfig -> key of a recipe.
KEYS: dict[str, Key] = {
    "target_modules": ("targets",),
    "exclude_modules": ("exclude",),
    "target_parameters": ("target_parameters",),
    "target_slices": ("lily", "slices"),
    "parallel_modules": ("lily", "parallel"),
    "group_options": ("lily", "groups"),
    "rank_pattern": ("lily", "groups"),
    "shared_router": ("lily", "shared_router"),
}

# Method with the section `lora` -> arguments of PEFT's LoraConfig.
LORAS: dict[str, dict[str, bool]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
HEAD = "head"  # the part of what is trained that is no part of the adapter
RSLORA_ALPHA = 16  # the same for every rank: rsLoRA's scale alpha / sqrt(r) is meant to suit all of them


def peft_config(recipe: Recipe | DreamBooth, model: nn.Module) -> PeftConfig | None:
    """The configuration of the recipe's method; `model` may be on the meta device, so no weight has to be read.

    Returns:
        A `LilyConfig`, a `LoraConfig`, the configuration of another method of PEFT, one that trains only the head
        (`none`), or None if `none` leaves nothing to train (sft).

    Raises:
        LilyError: if the targets match nothing, or the budget is too small.
    """
    if recipe.method == "lily":
        return lily_config(recipe, model)
    task_type, heads = task_type_of(recipe), saved_heads(recipe, model)
    if recipe.method != "none":
        return _other_config(recipe, model, decide(recipe, model))
    if recipe.task == "sft":
        return None
    if not heads_of(model):
        with located(recipe, "method"):
            raise LilyError(
                f"method: none trains only the head, but {type(model).__name__} has no module named "
                f"{' or '.join(HEADS)}; choose another method"
            )
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type=task_type, modules_to_save=heads)


def _other_config(recipe: Recipe | DreamBooth, model: nn.Module, lily: Decided) -> PeftConfig:
    """The configuration of a method besides Lily; if its rank is open, it has no more parameters than Lily."""
    config, layers = lily.config, whole_layers(model, lily.modules, recipe.exclude)
    if not layers:
        with located(recipe, "exclude"):
            raise LilyError("leaves LoRA no layer inside the modules of lily.parallel; relax it")
    if recipe.method == "stock-lily":
        with located(recipe, "method"):
            return other_peft.stock_config(config, lily.plan, model, saved_heads(recipe, model))
    common = {
        "target_modules": lora_targets(model, config, layers),
        "exclude_modules": recipe.exclude,
        "target_parameters": recipe.target_parameters,
        "task_type": task_type_of(recipe),
        "modules_to_save": saved_heads(recipe, model),
    }
    if recipe.method in LORAS:
        return _lora_config(recipe, model, lily, layers, common)
    assert recipe.task != "dreambooth"  # its methods are lily and lora
    with located(recipe, "peft"):
        budget, max_rank = lily.plan.parameters.total, other_peft.widest(layers)
        return other_peft.config_of(recipe.peft, common, model, budget, max_rank)


def _lora_config(
    recipe: Recipe | DreamBooth,
    model: nn.Module,
    lily: Decided,
    layers: Sequence[ModuleSpec],
    common: Mapping[str, Any],
) -> LoraConfig:
    """LoRA, rsLoRA or DoRA on these layers."""
    section, budget = recipe.lora, lily.plan.parameters.total
    if lily.config.target_parameters and section.dropout:
        with located(recipe, "lora", "dropout"):
            raise LilyError("LoRA of target_parameters supports no dropout; set lora.dropout to 0")

    def of_rank(r: int) -> LoraConfig:
        return LoraConfig(
            r=r,
            lora_alpha=section.alpha or (RSLORA_ALPHA if recipe.method == "rslora" else 2 * r),
            lora_dropout=section.dropout,
            **common,
            **LORAS[recipe.method],
        )

    if section.r != "equal":
        return of_rank(section.r)
    if recipe.method == "dora":  # it also has a magnitude for each output, so its size is counted
        with located(recipe, "method"):
            return of_rank(other_peft.largest_rank(model, of_rank, budget, other_peft.widest(layers)))
    return of_rank(equal_lora_rank(layers, budget))


def task_type_of(recipe: Recipe | DreamBooth) -> str | None:
    """PEFT's name of the task; None for images, for which PEFT has no name."""
    return {"sft": "CAUSAL_LM", "dreambooth": None, "image-classification": None}.get(recipe.task, "SEQ_CLS")


def saved_heads(recipe: Recipe | DreamBooth, model: nn.Module) -> list[str] | None:
    """Heads to train and save whole, for tasks without a PEFT task type; with one, PEFT finds them itself."""
    return heads_of(model) if recipe.task == "image-classification" else None


def lora_targets(model: nn.Module, config: LilyConfig, layers: Sequence[ModuleSpec]) -> Any:
    """LoRA's `target_modules` for the layers that Lily's `config` adapts; inside a parallel module, its linear layers.

    `layers` are from `lily.plan.select_parts.whole_layers`.
    """
    if not config.parallel_modules:
        return config.target_modules
    names = {layer.name for layer in layers if layer.kind not in PARAMETERS}
    others = [name for name, _ in model.named_modules() if name and name not in names]
    return _find_minimal_target_modules(sorted(names), others)


def lily_config(recipe: Recipe | DreamBooth, model: nn.Module) -> LilyConfig:
    """The recipe's Lily; `lily.budget` chooses what it leaves open of r, num_A and num_B."""
    return decide(recipe, model).config


def decide(recipe: Recipe | DreamBooth, model: nn.Module) -> Decided:
    """The recipe's Lily, whatever its method: `lily.plan.decide.decide` with the recipe's keys.

    The model may be on the meta device.

    Raises:
        LilyError: if the targets match nothing, or the budget is too small.
    """
    lily, heads, task_type = recipe.lily, saved_heads(recipe, model), task_type_of(recipe)
    targets = set(recipe.targets) if isinstance(recipe.targets, list) else recipe.targets
    groups = lily.groups or {}
    config = {
        "target_modules": targets if targets or recipe.target_parameters else None,
        "exclude_modules": recipe.exclude,
        "target_parameters": recipe.target_parameters,
        "target_slices": lily.slices,
        "parallel_modules": lily.parallel,
        "shared_router": lily.shared_router,
        # stock Lily has no distinction, so its shape is planned without
        "distinct": lily.distinct or ("none" if recipe.method == "stock-lily" else None),
        "distinct_seed": lily.distinct_seed,
        "gain": lily.gain,
        "own_r": lily.own_r,
        "routing": lily.routing,
        "task_type": task_type,
        "modules_to_save": SAVED_HEADS.get(task_type or "") or heads,
    }
    options = {
        "scaling": lily.scaling,
        "batch_scope": lily.batch_scope,
        "dropout": lily.dropout,
        "activation": lily.activation,
        "init_weights": lily.init_weights,
        "settled": None if lily.settle is None else 0.0,
        "modules_to_save": heads,
        "group_options": {name: group.options for name, group in groups.items() if group.options} or None,
        # The first key that fits counts there; of `group_options` the longest.
        "rank_pattern": {
            re.escape(name): groups[name].r
            for name in sorted(groups, key=len, reverse=True)
            if groups[name].r is not None
        },
    }
    budget: Key = ("lily",) if lily.params is None else ("lily", "params")
    with located(recipe, *budget):
        parameters = None if lily.params is None else parse_count(lily.params)
    shape = {key: getattr(lily, key) for key in ("r", "num_A", "stride_A", "num_B", "fewest")} | {
        "parameters": parameters
    }
    # Where only slices are named, a target without a match is one of them.
    keys = KEYS if targets or not lily.slices else {**KEYS, "target_modules": KEYS["target_slices"]}

    def errors(step: Step) -> AbstractContextManager[None]:
        if step == "shape":
            return located(recipe, *budget)
        return recipe_errors(recipe, keys, KEYS["target_modules"] if step == "targets" else ("lily",))

    decided = plan.decide(model, config, shape, options, errors)
    reason = (*decided.choice.reason, *_group_reasons(groups))
    return replace(decided, choice=replace(decided.choice, reason=reason))


def _group_reasons(groups: Mapping[str, Group]) -> Iterator[str]:
    for name, group in groups.items():
        values = {"r": group.r, **group.options} if group.r is not None else group.options
        if values:
            yield f"{name}: {', '.join(f'{key}={value}' for key, value in values.items())}, as given for this group."


@contextmanager
def recipe_errors(
    recipe: Recipe | DreamBooth, keys: Mapping[str, Key] = KEYS, default: Key = KEYS["target_modules"]
) -> Iterator[None]:
    """Within: errors name the recipe's `keys` instead of `LilyConfig`'s options, and the file and line of the key.

    An error that mentions no option which the recipe sets is located at the key `default`.
    """
    try:
        yield
    except LilyError as error:
        text = str(error)
        # An error names first what is wrong, and then perhaps what could be used instead.
        mentioned = [(text.index(option), key) for option, key in keys.items() if option in text]
        written = sorted((at, key) for at, key in mentioned if key in recipe.locations.written)
        for option, key in keys.items():
            text = text.replace(option, ".".join(key))
        with located(recipe, *(written[0][1] if written else default)):
            raise type(error)(text) from None


def learning_rate(recipe: Recipe | DreamBooth) -> float:
    """The adapter's learning rate: of the method's section if that sets one, else of the schedule."""
    section = section_of(recipe.method)
    own = None if section is None else getattr(recipe, section).learning_rate
    return own or recipe.train.learning_rate


def ratios_of(recipe: Recipe | DreamBooth) -> dict[str, float]:
    """The ratios of learning rates that are not 1 and concern the recipe's method; only Lily has routers."""
    names = {"lily": ("B_lr_ratio", "router_lr_ratio"), None: ()}.get(section_of(recipe.method), ("B_lr_ratio",))
    return {name: ratio for name in names if (ratio := getattr(recipe.train, name)) != 1}


def learning_rates(recipe: Recipe | DreamBooth) -> dict[str, float]:
    """The learning rate of each part of an adapter (`lily.optim.PARTS`) and of a new head."""
    rate, head = learning_rate(recipe), getattr(recipe.train, "head_learning_rate", None)
    multiples = multiples_of(**ratios_of(recipe))
    return {**{part: rate * multiple for part, multiple in multiples.items()}, HEAD: head or rate}


def planned_rates(recipe: Recipe | DreamBooth, plan: SharingPlan) -> dict[str, float]:
    """Those of `learning_rates` that the recipe will train with, by Lily's plan; empty if no ratio changes one."""
    if not ratios_of(recipe):
        return {}
    lily, static = section_of(recipe.method) == "lily", plan.routing == "static"
    trained = {
        "A": True,
        "B": True,
        "router": lily and plan.parameters.router > 0 and not static,
        "logits": lily and plan.parameters.router > 0 and (static or recipe.lily.settle is not None),
        "gain": lily and any(group.gain for group in plan.groups),
        HEAD: recipe.task not in ("sft", "dreambooth"),
    }
    return {part: rate for part, rate in learning_rates(recipe).items() if trained.get(part)}


def section_of(method: str) -> str | None:
    """The section of a recipe that holds a method's options."""
    if method in LORAS:
        return "lora"
    return {"lily": "lily", "stock-lily": "lily", "peft": "peft"}.get(method)
