"""What a sweep says in the end: a table, and the plot of quality against granularity."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from lily.analysis.granularity import Quality
from lily.analysis.plots import Picture, quality_plot
from lily.compare.tables import with_spread
from lily.recipes.metrics import LOWER_IS_BETTER
from lily.tune.granularity import LORA, Granularity


def print_sweep(found: Granularity, output: Path, console: Console) -> None:
    """The table of a sweep, by falling rank."""
    measured = any(entry.forgetting for entry in found.entries)
    more = ["forgetting"] if measured else []
    title = f"{found.name}: {found.budget:,} parameters, {found.rows:,} {found.split} rows"
    heads = ("", "r", "num_A", "num_B", "parameters", f"{found.metric}, {found.split}", "validation", *more, "steps")
    table = Table(*heads, title=title)
    for entry in found.entries:
        cells = [
            "LoRA" if entry.name == LORA else entry.name,
            str(entry.r),
            str(entry.num_A or ""),
            str(entry.num_B or ""),
            f"{entry.parameters:,}",
            _spread(found.metric, entry.held_out),
            _spread(found.metric, entry.validation),
            *([_spread("forgetting", entry.forgetting)] if measured else []),
            str(entry.steps),
        ]
        table.add_row(*cells)
    console.print(table)
    failed = sum(len(entry.failed) for entry in found.entries)
    if failed:
        console.print(f"{failed} runs failed; see {output / 'logs'}")
    seeds = "one seed" if len(found.seeds) == 1 else f"{len(found.seeds)} seeds, mean and standard deviation"
    console.print(f"{seeds}; figures: {output / 'granularity.json'}", soft_wrap=True)


def picture(found: Granularity) -> Picture:
    """Quality against granularity: on the held-out rows, or on the validation rows where only those were looked at."""
    unit = 1.0 if found.metric in LOWER_IS_BETTER else 100.0
    on_held_out = all(entry.held_out for entry in found.entries if not entry.failed)
    values = {e.name: tuple(unit * v for v in (e.held_out if on_held_out else e.validation)) for e in found.entries}
    shapes = [e for e in found.entries if e.name != LORA and values[e.name]]
    points = [Quality(e.r, e.num_A or 0, e.num_B or 0, values[e.name]) for e in shapes if e.num_A]
    rows = found.split if on_held_out else "validation"
    metric = f"{found.metric} on the {rows} rows" + (" (%)" if unit == 100 else "")
    uneven = any(p.num_A != p.num_B for p in points)
    return quality_plot(points, metric, values.get(LORA, ()), by_experts=uneven and len(points) > 8)


def _spread(metric: str, values: tuple[float, ...]) -> str:
    return with_spread(metric, values) if values else ""
