"""What a sweep says in the end: a table, and the plot of quality against granularity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lily.analysis.granularity import Quality
from lily.analysis.plots import Picture, quality_plot
from lily.compare.tables import with_spread
from lily.recipes.scoring.metrics import LOWER_IS_BETTER
from lily.tune.sweep import LORA, Entry, Granularity


def print_sweep(found: Granularity, output: Path, console: Console) -> None:
    """The table of a sweep, by falling rank."""
    measured = any(entry.forgetting for entry in found.entries)
    more = ["forgetting"] if measured else []
    title = escape(f"{found.name}: {found.budget:,} parameters, {found.rows:,} {found.split} rows")
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
        console.print(escape(f"{failed} runs failed; see {output / 'logs'}"), soft_wrap=True)
    seeds = "one seed" if len(found.seeds) == 1 else f"{len(found.seeds)} seeds, mean and standard deviation"
    console.print(escape(f"{seeds}; figures: {output / 'granularity.json'}"), soft_wrap=True)


def picture(found: Granularity) -> Picture:
    """Quality against granularity, of the shapes that were trained as long as one another.

    Those are the ones with held-out values, beside LoRA; where no shape came so far, the furthest ones, on the
    validation rows. The others are named in the alternative text.
    """
    unit = 1.0 if found.metric in LOWER_IS_BETTER else 100.0
    shapes = [e for e in found.entries if e.name != LORA]
    complete = any(e.held_out for e in shapes)
    furthest = max((e.steps for e in shapes if e.validation), default=0)
    values = {
        e.name: tuple(unit * v for v in (e.held_out if complete else e.validation if e.steps == furthest else ()))
        for e in found.entries
    }
    points = [Quality(e.r, e.num_A, e.num_B or 0, values[e.name]) for e in shapes if e.num_A and values[e.name]]
    metric = f"{found.metric} on the {found.split if complete else 'validation'} rows" + (" (%)" if unit == 100 else "")
    uneven = any(p.num_A != p.num_B for p in points)
    lora = values.get(LORA, ()) if complete else ()
    drawn = quality_plot(points, metric, lora, by_experts=uneven and len(points) > 8)
    left = [_left_out(e) for e in shapes if not values[e.name]]
    return replace(drawn, alt=f"{drawn.alt} Not shown: {', '.join(left)}.") if left else drawn


def _left_out(entry: Entry) -> str:
    return f"{entry.name} (given up after {entry.steps} steps)" if entry.validation else f"{entry.name} (failed)"


def _spread(metric: str, values: tuple[float, ...]) -> str:
    return with_spread(metric, values) if values else ""
