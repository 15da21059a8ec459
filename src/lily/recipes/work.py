"""What a run will do, by stage and kind of work (`lily.progress.estimate`), known before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lily.recipes.data.rows import Splits
from lily.recipes.scoring.metrics import metrics_of
from lily.recipes.spec.schema import Recipe

Units = dict[str, float]
BASELINES = {"majority": "majority", "tfidf": "TF-IDF", "frozen": "frozen encoder"}  # their names for people
OF_NUMBERS = {"majority": "mean"}  # of a regression, where they have another


def contestant(recipe: Recipe) -> str:
    """What a recipe's method is called in lines of progress."""
    return str(recipe.peft.peft_type).lower() if recipe.method == "peft" else recipe.method


def title(name: str, recipe: Recipe) -> str:
    """What a baseline is called in lines of progress."""
    return (OF_NUMBERS if recipe.task == "text-regression" else {}).get(name) or BASELINES.get(name, name)


def names_of(recipe: Recipe) -> list[str]:
    """Who will be named in lines of progress: the method and its baselines."""
    return [contestant(recipe), *(title(name, recipe) for name in recipe.baselines if name != recipe.method)]


def steps_of(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a recipe on a number of training examples (packing needs fewer)."""
    t = recipe.train
    per_epoch = math.ceil(math.ceil(rows / t.batch_size) / t.gradient_accumulation)
    return t.max_steps or max(1, math.ceil(t.epochs * per_epoch))


def evaluations_of(recipe: Recipe, steps: int, epochs: float) -> int:
    """Evaluations of a run with a number of optimizer steps and epochs; the last step always has one."""
    every = recipe.train.evaluate_every
    return max(1, math.ceil(epochs) if every == "epoch" else math.ceil(steps / every))


def judged(recipe: Recipe, rows: int) -> Units:
    """The work of judging rows."""
    answered = recipe.task == "sft" and "exact_match" in metrics_of(recipe)
    return {"judge": float(rows), **({"generate": float(rows)} if answered else {})}


def work_of(
    recipe: Recipe, splits: Splits, examples: int, general: int = 0, *, validation_only: bool = False
) -> Mapping[str, Units]:
    """Stage -> kind of work -> units, of a run without its baselines.

    Args:
        recipe: of the run.
        splits: its rows.
        examples: number of training examples.
        general: number of general texts, judged before training and at every evaluation.
        validation_only: the run is the trial of a search.
    """
    steps = steps_of(recipe, examples)
    batch = recipe.train.batch_size * recipe.train.gradient_accumulation
    epochs = steps * batch / max(examples, 1) if recipe.train.max_steps else recipe.train.epochs
    times = evaluations_of(recipe, steps, epochs)
    at_once = {kind: units * times for kind, units in judged(recipe, len(splits.validation)).items()}
    stages = {"training": {"train": float(steps * batch)}, "evaluation": at_once}
    stages["evaluation"]["judge"] += general * times
    if not validation_only:
        tested = judged(recipe, len(splits.held_out) + sum(map(len, splits.tests.values())))
        if recipe.task == "sft":
            tested["generate"] = tested.get("generate", 0.0) + recipe.generation.samples
        stages |= {"untrained": tested, "test": dict(tested)}
    if recipe.method == "none":
        return {"untrained": stages["untrained"]} if "untrained" in stages else {}
    return stages


def baselines_of(recipe: Recipe, splits: Splits, own: Mapping[str, Units]) -> Mapping[tuple[str, str], Units]:
    """The same of a run's baselines, by name and stage; `own`: of the run itself, as which LoRA takes as long."""
    rows = float(len(splits.train) + len(splits.held_out))
    found: dict[tuple[str, str], Units] = {}
    for name in recipe.baselines:
        if name == "lora" and recipe.method != "lora":
            found |= {("lora", stage): units for stage, units in {"loading": {"load": 1.0}, **own}.items()}
        elif name != "lora":
            found[title(name, recipe), "baseline"] = {"judge" if name == "frozen" else "fit": rows}
    return found
