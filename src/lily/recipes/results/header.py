"""The header of a run: model, data, method, steps, and where it goes."""

from __future__ import annotations

from pathlib import Path

from lily.io.words import counted
from lily.recipes.results.card import method_title
from lily.recipes.results.result import Result
from lily.recipes.spec.schema import Recipe

SHAPE = ("peft_type", "r", "num_A", "num_B", "scaling", "scale", "alpha", "learning_rate")


def header(recipe: Recipe, result: Result, output: Path, resumed: str | None = None) -> list[str]:
    """Lines to show before the first step.

    Args:
        recipe: of the run.
        result: what is known before training.
        output: the run's folder.
        resumed: name of the checkpoint that the run continues from.
    """
    lines = [
        ("model", _model(recipe)),
        ("", f"{result.parameters['base']:,} parameters, {result.precision}, {result.device}"),
        ("data", _rows(result)),
        *(("", fact) for fact in (result.data.facts() if result.data is not None else ())),
        ("method", f"{_title(recipe, result)}: {settings(result)}"),
        ("", _trained(result)),
        *([("steps", _steps(recipe))] if recipe.method != "none" else []),
        ("into", f"{output}" + (f", continued from {resumed}" if resumed else "")),
    ]
    return [f"{recipe.name}  {recipe.task}, seed {recipe.seed}", *(f"  {name:<6}  {text}" for name, text in lines), ""]


def settings(result: Result) -> str:
    """The shape, scale and learning rate of an adapter."""
    adapter = dict(result.adapter)
    if result.method == "lora" and "lora_alpha" in adapter:
        adapter["scale"] = adapter["lora_alpha"] / adapter["r"]
    values = [(name, adapter[name]) for name in SHAPE if name in adapter]
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values)


def _model(recipe: Recipe) -> str:
    source = recipe.model
    if source.package is not None:
        return f"{Path(source.package.member).name} of the package {source.package.name}"
    name = source.hub or source.path or f"the stand-in {source.standin}"
    return name if source.quantization == "none" else f"{name} in {source.quantization}"


def _rows(result: Result) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in result.rows.items() if count)
    return f"{counts} rows" + (f"; {_classes(result.labels)}" if result.labels else "")


def _classes(labels: list[str]) -> str:
    shown = ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else "")
    return f"{len(labels)} classes ({shown})"


def _title(recipe: Recipe, result: Result) -> str:
    titles = {"lora": "LoRA", "none": "no adapter"}
    return titles.get(recipe.method, method_title(result))


def _trained(result: Result) -> str:
    adapter, head, base = (result.parameters[name] for name in ("adapter", "head", "base"))
    new_head = f", and {head:,} of a new head" if head else ""
    return f"{adapter:,} parameters train ({adapter / max(base, 1):.2%}){new_head}"


def _steps(recipe: Recipe) -> str:
    t = recipe.train
    length = counted(t.max_steps, "step") if t.max_steps else counted(t.epochs, "epoch")
    batch = f"batches of {t.batch_size}" + (f" x {t.gradient_accumulation}" if t.gradient_accumulation > 1 else "")
    every = "epoch" if t.evaluate_every == "epoch" else "step" if t.evaluate_every == 1 else f"{t.evaluate_every} steps"
    stop = f", stops after {t.early_stopping} without improvement" if t.early_stopping else ""
    return f"{length} in {batch}, evaluated every {every}{stop}"
