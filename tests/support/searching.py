"""A training that takes no time: its figures follow from the recipe alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lily.errors import DivergedError
from lily.recipes.methods.configs import learning_rate
from lily.recipes.results.result import Result, output_folder

# The best of what is searched, and a learning rate beyond which training diverges.
LEARNING_RATE, SCALING, TOO_MUCH = 0.03, 0.5, 0.07


def quality(recipe: Any) -> float:
    """Highest at the best learning rate and scaling, 0 to 1."""
    away = math.log(learning_rate(recipe) / LEARNING_RATE) ** 2 + math.log(recipe.lily.scaling / SCALING) ** 2
    return math.exp(-away / 8)


class FakeTraining:
    """In place of `lily.recipes.train.train`.

    Args:
        evaluations: of each run.
        ending: is called with the run's number and evaluation, and may raise.
    """

    def __init__(self, evaluations: int = 4, ending: Callable[[int, int], None] = lambda run, evaluation: None) -> None:
        self.evaluations, self.ending = evaluations, ending
        self.recipes: list[Any] = []
        self.flags: list[dict[str, Any]] = []

    def __call__(self, recipe: Any, *, watch: Any = None, **flags: Any) -> Result:
        self.recipes.append(recipe)
        self.flags.append(flags)
        folder = output_folder(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").touch()
        for name in ("best", "checkpoints"):
            (folder / name).mkdir(exist_ok=True)
        history: list[dict[str, float]] = []
        for i in range(1, self.evaluations + 1):
            self.ending(len(self.recipes) - 1, i)
            if learning_rate(recipe) > TOO_MUCH:
                raise DivergedError("step 3: the loss is nan")
            value = quality(recipe) * i / self.evaluations
            history.append({"step": 10.0 * i, "epoch": float(i), "accuracy": value, "general_loss": 2 + value})
            if watch is not None and watch(list(history)):
                break
        result = Result(recipe.name, recipe.method, recipe.task, recipe.seed, "accuracy", "validation", None)
        result.best = {"epoch": history[-1]["epoch"], "value": history[-1]["accuracy"]}
        result.last, result.history = result.best, history
        result.final = {"accuracy": history[-1]["accuracy"]}
        result.parameters = {"adapter": 100, "head": 0, "base": 1000}
        result.seconds = {"train": 1.0}
        if recipe.forgetting is not None:
            result.forgetting = {"before": 2.0, "increase": history[-1]["accuracy"]}
        (folder / "metrics.json").write_text("{}")
        return result
