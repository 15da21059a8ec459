"""The closing table of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lily.io import tables
from lily.recipes import methods, work
from lily.recipes.methods.configs import ratios_of
from lily.recipes.results.review_table import print_review
from lily.recipes.scoring import test_sets
from lily.recipes.scoring.metrics import metrics_of, shown
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from lily.recipes.results.result import Result
    from lily.recipes.results.run_files import RunFigures
    from lily.recipes.spec.dreambooth import DreamBooth


def adapter_summary(model: Any, recipe: Recipe | DreamBooth) -> dict[str, Any]:
    """Method, rank, sharing and learning rate of the adapter."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None or recipe.method == "none":
        return {"method": recipe.method, "learning_rate": methods.learning_rate(recipe)}
    names = ("r", "num_A", "stride_A", "num_B", "scaling", "routing", "lora_alpha", "alpha")
    values = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    if recipe.method == "peft":
        values = {"peft_type": str(recipe.peft.peft_type).upper(), **values}
    if recipe.method == "lily" and recipe.lily.settle is not None and getattr(config, "routing", None) == "static":
        values["routing"] = "static, settled"
    return {"method": recipe.method, **values, "learning_rate": methods.learning_rate(recipe), **ratios_of(recipe)}


def print_result(result: Result, recipe: Recipe, output: Path, console: Console) -> None:
    """Print baselines and adapter on the same held-out rows, then the files' locations."""
    names, final = columns(result, recipe)
    rows = result.rows[result.split]
    table = Table(
        "",
        *names,
        "trained",
        "seconds",
        "file",
        title=escape(f"{result.name}: {rows:,} {result.split} rows, seed {result.seed}"),
    )
    for name, figures in result.baselines.items():
        table.add_row(title(name, recipe), *values_of(names, figures), *costs_of(figures))
    table.add_row("untrained", *values_of(names, result.before), "", "", "")
    table.add_row(f"[bold]{method_title(result)}[/]", *values_of(names, final), *costs_of(adapter_costs(result)))
    console.print(table)
    if result.tests:
        console.print(tables.terminal(*tests(result, recipe)))
    if result.forgetting:
        console.print(forgetting(result))
    for sample in result.samples:
        console.print(f"[dim]{escape(sample['prompt'].strip()[-300:])}[/]")
        for name in ("expected", "before", "after"):
            if name in sample:
                console.print(Text(f"  {name}: {' '.join(sample[name].split())}"))
    print_review(result.review, console)
    if result.best is not None:
        console.print(f"{epochs(result)}; {result.seconds['total']:.0f} s in all", soft_wrap=True, highlight=False)
        console.print(escape(f"adapter: {output / 'best'}    figures: {output / 'metrics.json'}"), soft_wrap=True)


def epochs(result: Result) -> str:
    """The main metric on the validation rows, after the best and after the last epoch."""
    if result.best is None or result.last is None:
        return ""
    best, last = (shown(result.metric, evaluation["value"]) for evaluation in (result.best, result.last))
    when = f"after epoch {result.best['epoch']:.3g}"
    return f"best {result.metric} on validation {best} {when}, after the last epoch {last}"


def tests(result: Result, recipe: Recipe) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table of further test sets."""
    counts = {name.removeprefix("tests."): count for name, count in result.rows.items() if name.startswith("tests.")}
    header, *lines = test_sets.tabled(result.tests, metrics_of(recipe), counts)
    return header, lines


def columns(result: Result, recipe: Recipe) -> tuple[list[str], dict[str, float]]:
    """Names of the tables' metric columns, and the values of the adapter."""
    names: list[str] = list(metrics_of(recipe))
    if not result.forgetting:
        return names, result.final
    return [*names, "forgetting"], {**result.final, "forgetting": result.forgetting["increase"]}


def forgetting(result: Result) -> str:
    """What the adapter lost on general text, in a sentence."""
    before, after = (result.forgetting[name] for name in ("before", "after"))
    return f"Forgetting: the loss per token of general text, {before:.4f} before training and {after:.4f} after."


def title(name: str, recipe: Recipe) -> str:
    """A baseline's name in a table."""
    titles = {
        "lora": "LoRA, equal parameters" if recipe.lora.r == "equal" else "LoRA",
    }
    return titles.get(name) or work.title(name, recipe)


def values_of(names: Sequence[str], metrics: Mapping[str, float]) -> list[str]:
    """The named metrics, formatted for a table."""
    return [shown(name, metrics.get(name)) for name in names]


def adapter_costs(run: Result | RunFigures) -> dict[str, float]:
    """A run's `parameters`, `seconds` and `bytes`, as baselines have them among their figures."""
    parameters = run.parameters.get("adapter", 0) or run.parameters.get("head", 0)
    return {"parameters": parameters, "seconds": run.seconds.get("train", 0.0), "bytes": run.adapter_bytes}


def costs_of(figures: Mapping[str, float]) -> list[str]:
    """Trained parameters, seconds and file size, formatted for a table; empty where they are not known."""
    parameters, seconds, size = (figures.get(name) for name in ("parameters", "seconds", "bytes"))
    return [
        f"{parameters:,.0f}" if parameters else "",
        f"{seconds:.0f}" if seconds else "",
        f"{size / 1e6:.2f} MB" if size else "",
    ]


def method_title(result: Result) -> str:
    """The method for a table."""
    return lily_title(result.adapter) if result.method == "lily" else result.method


def lily_title(adapter: Mapping[str, Any]) -> str:
    """Lily with what it depends on: its routing, or that there is one B and so nothing to route."""
    return "Lily (one B)" if adapter.get("num_B") == 1 else f"Lily ({adapter.get('routing')})"
