"""What `lily sweep` shows at its end: a table, and the plot of quality against granularity."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lily.analysis.granularity import Quality
from lily.analysis.plots import Picture, quality_plot
from lily.analysis.seeds import spread
from lily.compare.tables import with_spread
from lily.io.tables import fitting
from lily.io.words import counted
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, shown
from lily.tune.sweep import LORA, Granularity, ShapeResult


def print_sweep(sweep: Granularity, output: Path, console: Console) -> None:
    """The table of a sweep, by falling rank."""
    measured = any(entry.forgetting for entry in sweep.entries)
    more = ["forgetting"] if measured else []
    title = escape(f"{sweep.name}: {sweep.budget:,} parameters, {sweep.rows:,} {sweep.split} rows")
    heads = ("", "r", "num_A", "num_B", "parameters", f"{sweep.metric}, {sweep.split}", "validation", *more, "steps")
    rows = [
        [
            "LoRA" if entry.name == LORA else entry.name,
            str(entry.r),
            str(entry.num_A or ""),
            str(entry.num_B or ""),
            f"{entry.parameters:,}",
            _spread(sweep.metric, entry.held_out),
            _spread(sweep.metric, entry.validation),
            *([_spread("forgetting", entry.forgetting)] if measured else []),
            str(entry.steps),
        ]
        for entry in sweep.entries
    ]
    for table in fitting(heads, rows, console.width, title=title):
        console.print(table)
    failed = sum(len(entry.failed) for entry in sweep.entries)
    if failed:
        console.print(escape(f"{counted(failed, 'run')} failed; see {output / 'logs'}"), soft_wrap=True)
    seeds = "one seed" if len(sweep.seeds) == 1 else f"{len(sweep.seeds)} seeds, mean and standard deviation"
    console.print(escape(f"{seeds}; figures: {output / 'granularity.json'}"), soft_wrap=True)
    console.print(escape(verdict(sweep)), soft_wrap=True, highlight=False)


def verdict(sweep: Granularity) -> str:
    """Which shape is the best, and whether the others differ from it by more than seeds do, in a sentence."""
    means = {
        entry.name: statistics.fmean(entry.held_out) for entry in sweep.entries if entry.held_out and entry.name != LORA
    }
    if len(means) < 2:
        return "Fewer than two shapes were trained to the end, so there is nothing to compare."
    sign = -1.0 if sweep.metric in LOWER_IS_BETTER else 1.0
    first, *_, last = sorted(means, key=lambda name: -sign * means[name])
    deviations = [value for entry in sweep.entries if (value := spread(entry.held_out)) is not None]
    if means[first] == means[last]:
        return (
            f"All shapes have the same {sweep.metric} ({shown(sweep.metric, means[first])}) on {sweep.rows:,} "
            f"{sweep.split} rows, so nothing here tells which is better."
        )
    said = (
        f"Best shape: {first} ({shown(sweep.metric, means[first])}); worst: {last} "
        f"({shown(sweep.metric, means[last])}), on {sweep.rows:,} {sweep.split} rows of {sweep.metric}."
    )
    if not deviations:
        return f"{said} One seed does not show whether shapes differ by more than seeds do: repeat with --seeds 3."
    more = abs(means[first] - means[last]) > 2 * max(deviations)
    return f"{said} The shapes differ by {'more' if more else 'no more'} than seeds do."


def picture(sweep: Granularity) -> Picture:
    """Quality against granularity, of shapes that were trained for the same number of steps.

    These are the ones with held-out values, and LoRA; if there are none, those with the most steps, on the validation
    rows. The alternative text names the others.
    """
    unit = 1.0 if sweep.metric in LOWER_IS_BETTER else 100.0
    shapes = [e for e in sweep.entries if e.name != LORA]
    complete = any(e.held_out for e in shapes)
    furthest = max((e.steps for e in shapes if e.validation), default=0)
    values = {
        e.name: tuple(unit * v for v in (e.held_out if complete else e.validation if e.steps == furthest else ()))
        for e in sweep.entries
    }
    points = [Quality(e.r, e.num_A, e.num_B or 0, values[e.name]) for e in shapes if e.num_A and values[e.name]]
    metric = f"{sweep.metric} on the {sweep.split if complete else 'validation'} rows" + (" (%)" if unit == 100 else "")
    uneven = any(p.num_A != p.num_B for p in points)
    lora = values.get(LORA, ()) if complete else ()
    drawn = quality_plot(points, metric, lora, by_experts=uneven and len(points) > 8)
    missing = [_left_out(e) for e in shapes if not values[e.name]]
    return replace(drawn, alt=f"{drawn.alt} Not shown: {', '.join(missing)}.") if missing else drawn


def _left_out(entry: ShapeResult) -> str:
    return f"{entry.name} (stopped after {entry.steps} steps)" if entry.validation else f"{entry.name} (failed)"


def _spread(metric: str, values: tuple[float, ...]) -> str:
    return with_spread(metric, values) if values else ""
