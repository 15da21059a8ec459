"""How many steps a recipe trains, and when it is evaluated: what `lily plan` counts before anything is run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lily.recipes.spec.dreambooth import DreamBooth
    from lily.recipes.spec.schema import Recipe


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    Attributes:
        steps: optimizer steps.
        batch: rows of a step.
        per_epoch: steps of an epoch; None where there are no epochs.
        evaluations: on the validation rows, while it trains.
        warmup: steps in which the learning rate rises.
    """

    steps: int
    batch: int
    per_epoch: int | None
    evaluations: int
    warmup: int


def schedule_of(recipe: Recipe, examples: int) -> Schedule:
    """The schedule of a recipe for text or images.

    Args:
        recipe: its section train.
        examples: that train.
    """
    train = recipe.train
    per_epoch = math.ceil(math.ceil(examples / train.batch_size) / train.gradient_accumulation)
    steps = train.max_steps or math.ceil(train.epochs * per_epoch)
    every = per_epoch if train.evaluate_every == "epoch" else train.evaluate_every
    warmup = math.ceil(train.warmup * steps) if train.warmup < 1 else round(train.warmup)
    return Schedule(
        steps, train.batch_size * train.gradient_accumulation, per_epoch, math.ceil(steps / every), min(warmup, steps)
    )


def drawing_schedule(recipe: DreamBooth) -> Schedule:
    """The schedule of a recipe of task dreambooth."""
    train = recipe.train
    batch, every = train.batch_size * train.gradient_accumulation, recipe.validation.every
    return Schedule(train.max_steps, batch, None, math.ceil(train.max_steps / every), train.warmup)
