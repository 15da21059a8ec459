"""What a recipe's method makes of a model: the PEFT configuration, decided on a model without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from lily.budget import choose, equal_lora_rank, parse_count
from lily.config import LilyConfig
from lily.errors import LilyError
from lily.kinds import ModuleSpec
from lily.plan import SAVED_HEADS, build_plan, is_causal
from lily.recipes.places import located
from lily.recipes.schema import Recipe
from lily.targets import select_targets

if TYPE_CHECKING:
    from lily.recipes.dreambooth.schema import DreamBooth

# LilyConfig's options -> what recipes call them.
KEYS = {"target_modules": "targets", "exclude_modules": "exclude"}

HEADS = ("classifier", "score", "classification_head")


def peft_config(recipe: Recipe | DreamBooth, model: nn.Module) -> PeftConfig | None:
    """The adapter that the recipe's method puts on a model.

    Args:
        recipe: decides method, targets and budget.
        model: the base model; the meta device will do, so this runs before a weight is read.

    Returns:
        A `LilyConfig`, a `LoraConfig`, a configuration that trains the head alone (`none`), or None where `none`
        leaves nothing to train (sft).

    Raises:
        LilyError: if the targets match nothing, or the budget does not fit.
    """
    if recipe.method == "lily":
        return lily_config(recipe, model)
    task_type = task_type_of(recipe)
    if recipe.method == "lora":
        config = lily_config(recipe, model)
        modules = select_targets(model, config)
        if config.target_parameters and recipe.lora.dropout:
            with located(recipe, "lora", "dropout"):
                raise LilyError("LoRA of target_parameters knows no dropout; set lora.dropout to 0")
        r = recipe.lora.r
        rank = r if isinstance(r, int) else equal_lora_rank(modules, build_plan(modules, config).parameters.total)
        return LoraConfig(
            r=rank,
            lora_alpha=recipe.lora.alpha or 2 * rank,
            lora_dropout=recipe.lora.dropout,
            target_modules=config.target_modules,
            exclude_modules=recipe.exclude,
            target_parameters=config.target_parameters,
            task_type=task_type,
        )
    if recipe.task == "sft":
        return None
    if not any(hasattr(model, name) for name in HEADS):
        with located(recipe, "method"):
            raise LilyError(
                f"method: none trains the head, but {type(model).__name__} has none named {', '.join(HEADS)}"
            )
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type=task_type)


def task_type_of(recipe: Recipe | DreamBooth) -> str | None:
    """PEFT's name of the task; it has none for drawing."""
    return {"sft": "CAUSAL_LM", "dreambooth": None}.get(recipe.task, "SEQ_CLS")


def lily_config(recipe: Recipe | DreamBooth, model: nn.Module) -> LilyConfig:
    """The recipe's Lily, with what it leaves open of r, num_A and num_B chosen by `lily.budget`."""
    block = recipe.lily
    common: dict[str, Any] = {
        "exclude_modules": recipe.exclude,
        "target_parameters": recipe.target_parameters,
        "routing": block.routing,
        "task_type": task_type_of(recipe),
    }
    targets = set(recipe.targets) if isinstance(recipe.targets, list) else recipe.targets
    with located(recipe, "targets"), in_recipes_words():
        heads = SAVED_HEADS.get(task_type_of(recipe) or "")
        asked = LilyConfig(target_modules=targets, modules_to_save=heads, **common)
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
        )
    return LilyConfig(
        target_modules=asked.target_modules,
        scaling=block.scaling,
        batch_scope=block.batch_scope,
        dropout=block.dropout,
        activation=block.activation,
        settled=None if block.settle is None else 0.0,
        **choice.options,
        **common,
    )


@contextmanager
def in_recipes_words() -> Iterator[None]:
    """Within: errors about `LilyConfig`'s options name the recipe's keys."""
    try:
        yield
    except LilyError as error:
        said = str(error)
        for option, key in KEYS.items():
            said = said.replace(option, key)
        raise type(error)(said) from None


def learning_rate(recipe: Recipe | DreamBooth) -> float:
    """The adapter's learning rate: the method's own, or the schedule's."""
    own = {"lily": recipe.lily.learning_rate, "lora": recipe.lora.learning_rate, "none": None}[recipe.method]
    return own or recipe.train.learning_rate
