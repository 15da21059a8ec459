"""A comparison as one self-contained HTML page: no script, no network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from lily.compare import tables
from lily.compare.result import Comparison, Entry
from lily.html import charts
from lily.html.charts import Point, Series
from lily.html.page import Block, Details, Figure, Grid, Page, Section, Table, Terms, curve_figure
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, shown

READING = (
    ("±", "Standard deviation over the seeds: another seed means other initial weights and another order of the rows. "
     "A difference that is not much larger than it may be chance."),
    ("against", "The difference to the first method, with the interval that contains 95% of the differences when the "
     "held-out rows are resampled (a bootstrap over rows)."),
    ("p", "How often a difference at least this large would occur on these rows if it did not matter which "
     "of the two methods judged a row. It says nothing about other seeds, and among many comparisons some are small "
     "by chance."),
    ("trained", "Trained parameters, without a new head."),
    ("rate", "Learning rate of the adapter."),
    ("scale", "What multiplies the update, in one unit: of LoRA, alpha divided by the rank (rsLoRA: by its root)."),
    ("s", "Seconds of training."),
    ("peak", "Peak memory of a run: of the GPU, or of the whole process without one."),
)  # fmt: skip
TUNING = (
    "The same search for every method, with one seed: first the learning rate at the recipe's scale, at half, once and "
    "twice the recipe's value, and further while the best value lies at an end; then the scale in the same way."
)


def page(comparison: Comparison) -> str:
    """The page as HTML."""
    several = any(len(entry.seeds) > 1 for entry in comparison.entries)
    return Page(
        title=f"{comparison.name}: a comparison",
        heading=f"{comparison.name}: {' / '.join(entry.title for entry in comparison.entries)}",
        subtitle=tables.about(comparison),
        lead=" ".join([tables.scores(comparison), *tables.verdicts(comparison)]),
        sections=[
            Section("quality", "Which method is better", _quality(comparison)),
            Section("training", "How it was learned", _training(comparison)),
            Section("costs", "What it costs", _costs(comparison)),
            Section("tuning", "How learning rate and scale were chosen", _tuning(comparison)),
            Section("reading", "How to read this page", [Terms(READING[0 if several else 1 :])]),
        ],
        notes=[f"{run} failed: {why}" for run, why in comparison.failed.items()],
    ).render()


def _style(index: int) -> str:
    return f"l{index % charts.EXPERT_COLORS}"


def _quality(comparison: Comparison) -> list[Block]:
    lines, metric = tables.quality(comparison), comparison.metric
    seeds = sorted({seed for entry in comparison.entries for seed in entry.seeds})
    by_seed = [[entry.title, *(_of_seed(entry, metric, seed) for seed in seeds)] for entry in comparison.entries]
    every = Table(metric, ["method", *(f"seed {seed}" for seed in seeds)], by_seed)
    return [
        Table(f"On {comparison.rows:,} {comparison.split} rows", _headed(lines[0]), lines[1:]),
        *tables.reading(comparison),
        *_tests(comparison),
        Details("Every seed", every),
    ]


def _headed(head: list[str]) -> list[str]:
    """The columns with a name for the first too, which a screen reader reads out."""
    return ["method", *head[1:]]


def _of_seed(entry: Entry, metric: str, seed: int) -> str:
    return shown(metric, entry.values[metric][entry.seeds.index(seed)]) if seed in entry.seeds else "-"


def _tests(comparison: Comparison) -> list[Table]:
    names = list(dict.fromkeys(name for entry in comparison.entries for name in entry.tests))
    metric = comparison.metric
    rows = [
        [entry.title, *(tables.with_spread(metric, entry.tests[name][metric]) for name in names)]
        for entry in comparison.entries
    ]
    return [Table(f"{metric} on further test sets", ["method", *names], rows)] if names else []


def _costs(comparison: Comparison) -> list[Block]:
    lines = tables.costs(comparison)
    table = Table("Of one run", _headed(lines[0]), lines[1:])
    label, of, why = _axis(comparison)
    figure = _scatter(comparison, label, of, why)
    return [table, *([] if figure is None else [Grid([figure])])]


def _axis(comparison: Comparison) -> tuple[str, Callable[[Entry], float], str]:
    """The cost to draw quality against: what differs most between methods; the table has the others."""
    axes: list[tuple[str, Callable[[Entry], float]]] = [
        ("trained parameters", lambda e: float(e.parameters)),
        ("seconds of training", lambda e: e.seconds),
        ("peak memory (MB)", lambda e: e.peak_bytes / 1e6),
    ]

    def ratio(of: Callable[[Entry], float]) -> float:
        values = [value for entry in comparison.entries if (value := of(entry)) > 0]
        return max(values) / min(values) if len(values) > 1 else 1.0

    label, of = max(axes, key=lambda axis: ratio(axis[1]))  # of equal ones the first
    return label, of, f"Of parameters, time and memory, this differs most ({ratio(of):.2g} times)."


def _scatter(comparison: Comparison, label: str, of: Callable[[Entry], float], why: str) -> Figure | None:
    lower = comparison.metric in LOWER_IS_BETTER
    factor = 1 if lower else 100
    points, rows = [], []
    for i, entry in enumerate(comparison.entries):
        mean, deviation = entry.mean(comparison.metric) * factor, entry.spread(comparison.metric)
        spread = (deviation or 0.0) * factor
        if math.isfinite(mean):
            points.append(Point(entry.title, _style(i), of(entry), mean, mean - spread, mean + spread))
            shown_spread = "-" if deviation is None else f"{spread:.2g}"  # one seed has none
            rows.append([entry.title, f"{of(entry):,.0f}", f"{mean:.4g}", shown_spread])
    if len(points) < 2:
        return None
    better = "lower" if lower else "higher"
    caption = f"{comparison.metric} by {label}; {better} is better, and further left is cheaper. {why}"
    if any(len(entry.seeds) > 1 for entry in comparison.entries):
        caption += " Bars: one standard deviation."
    unit = comparison.metric if lower else f"{comparison.metric} (%)"
    title = f"Quality against {label.removesuffix(' (MB)')}"
    numbers = Table(title, ["method", label, unit, "standard deviation"], rows)
    return Figure(title, charts.scatter(points, title, caption, label, unit), caption, numbers)


def _training(comparison: Comparison) -> list[Block]:
    metric = comparison.metric
    unit, label = (1.0, metric) if metric in LOWER_IS_BETTER else (100.0, f"{metric} (%)")
    series = [
        Series(entry.title, _style(i), points)
        for i, entry in enumerate(comparison.entries)
        if (points := tuple((step, unit * value) for step, value in entry.history if math.isfinite(value)))
    ]
    if not series:
        return []
    title = f"{metric} on the validation rows"
    caption = "Mean over seeds, at each evaluation. The best adapter of each seed was kept."
    chart = charts.lines(series, title, caption, "optimizer step", label)
    rows = [
        [entry.title, *(shown(metric, statistics.fmean(values)) for values in (entry.best, entry.last))]
        for entry in comparison.entries
        if entry.last and entry.best
    ]
    numbers = Table(f"{title}, mean over seeds", ["method", "best epoch", "last epoch"], rows)
    return [Grid([curve_figure(chart, series, "step")]), numbers]


def _tuning(comparison: Comparison) -> list[Block]:
    tuning = comparison.setting.get("tuning")
    if not tuning:
        return []
    titles = {entry.name: entry.title for entry in comparison.entries}
    heads = ["learning rate", "scale", f"{comparison.metric}, validation", "choice"]
    out: list[Block] = [TUNING]
    for name, chosen in tuning.items():
        if chosen["trials"]:
            title = titles.get(name, name)
            rows = [_trial(comparison.metric, trial, chosen) for trial in chosen["trials"]]
            out.append(Details(f"{title}: {len(rows)} runs", Table(title, heads, rows)))
    return out


def _trial(metric: str, trial: dict[str, float | None], chosen: dict[str, float | None]) -> list[str]:
    is_chosen = all(trial[name] == chosen[name] for name in ("learning_rate", "scale"))
    scale, value = trial["scale"], trial[metric]
    return [
        f"{trial['learning_rate']:g}",
        "-" if scale is None else f"{scale:g}",
        "failed" if value is None else shown(metric, value),
        "chosen" if is_chosen else "",
    ]
