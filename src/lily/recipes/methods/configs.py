"""What a recipe's method makes of a model: the PEFT configuration, decided on a model without weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from lily.errors import LilyError
from lily.plan.budget import Choice, choose, equal_lora_rank, parse_count
from lily.plan.config import LilyConfig
from lily.plan.select import is_causal, select_targets, whole_layers
from lily.plan.sharing_plan import SAVED_HEADS, SharingPlan, build_plan
from lily.plan.specs import PARAMETERS, ModuleSpec
from lily.recipes.methods import other_peft
from lily.recipes.models.load import HEADS, heads_of
from lily.recipes.spec.places import Key, located
from lily.recipes.spec.schema import Lily, Recipe

if TYPE_CHECKING:
    from lily.recipes.spec.dreambooth import DreamBooth

# LilyConfig's options -> what recipes call them.
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

# Methods of the `lora` block -> what they are to PEFT's class.
LORAS: dict[str, dict[str, bool]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
RSLORA_ALPHA = 16  # of no particular rank, since rsLoRA's scale is meant to hold for all of them


def peft_config(recipe: Recipe | DreamBooth, model: nn.Module) -> PeftConfig | None:
    """The adapter that the recipe's method puts on a model.

    Args:
        recipe: decides method, targets and budget.
        model: the base model; the meta device will do, so this runs before a weight is read.

    Returns:
        A `LilyConfig`, a `LoraConfig`, that of another method of PEFT, a configuration that trains the head alone
        (`none`), or None where `none` leaves nothing to train (sft).

    Raises:
        LilyError: if the targets match nothing, or the budget does not fit.
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
                f"method: none trains the head, but {type(model).__name__} has none named {', '.join(HEADS)}"
            )
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type=task_type, modules_to_save=heads)


def _other_config(recipe: Recipe | DreamBooth, model: nn.Module, lily: Decided) -> PeftConfig:
    """Another method's configuration, with no more parameters than the recipe's Lily where it leaves its rank open."""
    config, layers = lily.config, whole_layers(model, lily.modules, recipe.exclude)
    if not layers:
        with located(recipe, "exclude"):
            raise LilyError("leaves LoRA no layer inside the modules of lily.parallel; relax it")
    if recipe.method == "stock-lily":
        with located(recipe, "method"):
            return other_peft.stock_config(config, lily.plan, model, saved_heads(recipe, model))
    targets = lora_targets(model, config, layers)
    if recipe.method in LORAS:
        return _lora_config(recipe, model, lily, layers, targets)
    assert recipe.task != "dreambooth"  # whose methods are lily and lora
    block = recipe.peft
    wish = other_peft.Wish(
        str(block.peft_type),
        block.r,
        block.options,
        targets,
        recipe.exclude,
        recipe.target_parameters,
        task_type_of(recipe),
        saved_heads(recipe, model),
    )
    with located(recipe, "peft"):
        return other_peft.config_of(wish, model, lily.plan.parameters.total, other_peft.widest(layers))


def _lora_config(
    recipe: Recipe | DreamBooth, model: nn.Module, lily: Decided, layers: Sequence[ModuleSpec], targets: Any
) -> LoraConfig:
    """LoRA, rsLoRA or DoRA on these layers."""
    block, budget = recipe.lora, lily.plan.parameters.total
    if lily.config.target_parameters and block.dropout:
        with located(recipe, "lora", "dropout"):
            raise LilyError("LoRA of target_parameters knows no dropout; set lora.dropout to 0")

    def of_rank(r: int) -> LoraConfig:
        return LoraConfig(
            r=r,
            lora_alpha=block.alpha or (RSLORA_ALPHA if recipe.method == "rslora" else 2 * r),
            lora_dropout=block.dropout,
            target_modules=targets,
            exclude_modules=recipe.exclude,
            target_parameters=lily.config.target_parameters,
            task_type=task_type_of(recipe),
            modules_to_save=saved_heads(recipe, model),
            **LORAS[recipe.method],
        )

    if block.r != "equal":
        return of_rank(block.r)
    if recipe.method == "dora":  # a magnitude for each output besides
        with located(recipe, "method"):
            return of_rank(other_peft.largest_rank(model, of_rank, budget, other_peft.widest(layers)))
    return of_rank(equal_lora_rank(layers, budget))


def task_type_of(recipe: Recipe | DreamBooth) -> str | None:
    """PEFT's name of the task; it has none for images."""
    return {"sft": "CAUSAL_LM", "dreambooth": None, "image-classification": None}.get(recipe.task, "SEQ_CLS")


def saved_heads(recipe: Recipe | DreamBooth, model: nn.Module) -> list[str] | None:
    """Heads to train and save whole where PEFT does not know the task; where it does, it sees to them itself."""
    return heads_of(model) if recipe.task == "image-classification" else None


def lora_targets(model: nn.Module, config: LilyConfig, layers: Sequence[ModuleSpec]) -> Any:
    """LoRA's `target_modules` for what `config` adapts: its own, and the layers inside of modules.

    Args:
        model: the base model.
        config: Lily's.
        layers: from `lily.plan.select.whole_layers`.
    """
    if not config.parallel_modules:
        return config.target_modules
    names = {layer.name for layer in layers if layer.kind not in PARAMETERS}
    other_peft = [name for name, _ in model.named_modules() if name and name not in names]
    return _find_minimal_target_modules(sorted(names), other_peft)


@dataclass(frozen=True)
class Decided:
    """A recipe's Lily on a model.

    Attributes:
        config: what to put on it.
        modules: what is adapted.
        plan: who shares what.
        choice: r, num_A and num_B, and why.
    """

    config: LilyConfig
    modules: Sequence[ModuleSpec]
    plan: SharingPlan
    choice: Choice


def lily_config(recipe: Recipe | DreamBooth, model: nn.Module) -> LilyConfig:
    """The recipe's Lily, with what it leaves open of r, num_A and num_B chosen by `lily.budget`."""
    return decide(recipe, model).config


def decide(recipe: Recipe | DreamBooth, model: nn.Module) -> Decided:
    """The recipe's Lily, and what it is on a model.

    Args:
        recipe: decides targets and budget.
        model: the base model; the meta device will do.

    Raises:
        LilyError: if the targets match nothing, or the budget does not fit.
    """
    block = recipe.lily
    common: dict[str, Any] = {
        "exclude_modules": recipe.exclude,
        "target_parameters": recipe.target_parameters,
        "target_slices": block.slices,
        "parallel_modules": block.parallel,
        "shared_router": block.shared_router,
        "routing": block.routing,
        "task_type": task_type_of(recipe),
    }
    targets = set(recipe.targets) if isinstance(recipe.targets, list) else recipe.targets
    named = targets or recipe.target_parameters
    # Where only slices are named, they are what is not found.
    words = KEYS if targets or not block.slices else {**KEYS, "target_modules": KEYS["target_slices"]}
    with in_recipes_words(recipe, words):
        heads = SAVED_HEADS.get(task_type_of(recipe) or "") or saved_heads(recipe, model)
        asked = LilyConfig(target_modules=targets if named else None, modules_to_save=heads, **common)
        modules: list[ModuleSpec] = select_targets(model, asked)
    own = asked.routing_is_default and is_causal(model)
    routing = asked.default_routing(True) if own else str(asked.routing)
    with located(recipe, "lily", *(["params"] if block.params is not None else [])):
        choice = choose(
            modules,
            parameters=None if block.params is None else parse_count(block.params),
            r=block.r,
            num_A=block.num_A,
            stride_A=block.stride_A,
            num_B=block.num_B,
            routing=routing,
            targets=asked.target_modules,
            shared_router=block.shared_router,
        )
    with in_recipes_words(recipe, words, ("lily",)):
        config = LilyConfig(
            target_modules=asked.target_modules,
            scaling=block.scaling,
            batch_scope=block.batch_scope,
            dropout=block.dropout,
            activation=block.activation,
            settled=None if block.settle is None else 0.0,
            modules_to_save=saved_heads(recipe, model),
            group_options={name: own.options for name, own in (block.groups or {}).items() if own.options} or None,
            rank_pattern={re.escape(name): own.r for name, own in (block.groups or {}).items() if own.r is not None},
            **choice.options,
            **common,
        )
        plan = replace(build_plan(modules, config), routing=routing)
    return Decided(config, modules, plan, replace(choice, reason=(*choice.reason, *_own_reasons(block))))


def _own_reasons(block: Lily) -> Iterator[str]:
    for name, own in (block.groups or {}).items():
        given = {"r": own.r, **own.options} if own.r is not None else own.options
        if given:
            yield f"{name}: {', '.join(f'{key}={value}' for key, value in given.items())}, as given for this group."


@contextmanager
def in_recipes_words(
    recipe: Recipe | DreamBooth, words: Mapping[str, Key] = KEYS, otherwise: Key = KEYS["target_modules"]
) -> Iterator[None]:
    """Within: errors about `LilyConfig`'s options name the recipe's keys, and where they were written.

    Args:
        recipe: knows where.
        words: what the recipe calls the options.
        otherwise: the key to blame where none of these was written.
    """
    try:
        yield
    except LilyError as error:
        said = str(error)
        # An error names first what is wrong, and then perhaps what could be given instead.
        blamed = [(said.index(option), key) for option, key in words.items() if option in said]
        written = sorted((at, key) for at, key in blamed if key in recipe.places.written)
        for option, key in words.items():
            said = said.replace(option, ".".join(key))
        with located(recipe, *(written[0][1] if written else otherwise)):
            raise type(error)(said) from None


def learning_rate(recipe: Recipe | DreamBooth) -> float:
    """The adapter's learning rate: the method's own, or the schedule's."""
    block = block_of(recipe.method)
    own = None if block is None else getattr(recipe, block).learning_rate
    return own or recipe.train.learning_rate


def block_of(method: str) -> str | None:
    """The recipe's key that holds a method's own options."""
    if method in LORAS:
        return "lora"
    return {"lily": "lily", "stock-lily": "lily", "peft": "peft"}.get(method)
