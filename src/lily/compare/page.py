"""A comparison as one self-contained HTML page: no script, no network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from lily._version import __version__
from lily.compare import tables
from lily.compare.result import Comparison, Entry
from lily.html import charts
from lily.html.charts import Point, Series
from lily.html.common import curve_figure
from lily.html.markup import Child, Html, details, el, figure, join, table
from lily.insight.page import document
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, shown

READING = (
    ("±", "Standard deviation over the seeds: another seed means other first weights and another order of the rows. A "
     "difference that is not much larger than it may be chance."),
    ("against", "The difference to the first method, with the interval in which 95% of the differences lie when the "
     "held-out rows are drawn again (a bootstrap over rows)."),
    ("p", "How often a difference this large would come about on these rows if it made no difference which method "
     "judged a row. It tells nothing about other seeds, and of many comparisons some are small by chance."),
    ("trained", "Parameters that train, a new head aside."),
    ("scale", "How much the update counts, by the method's own option. It means something else for each method."),
    ("peak", "The most memory that a run held at once: of the GPU, or of the whole process where there is none."),
)  # fmt: skip


def page(found: Comparison) -> str:
    """The page as text.

    Args:
        found: the comparison.
    """
    parts = [
        ("quality", "Who is better", _quality(found)),
        ("costs", "What it costs", _costs(found)),
        ("training", "How it was learned", _training(found)),
        ("tuning", "How learning rate and scale were chosen", _tuning(found)),
        ("reading", "How to read this page", _reading(found)),
    ]
    shown_parts = [(id_, title, content) for id_, title, content in parts if content]
    contents = el("ol", *(el("li", el("a", title, href=f"#{id_}")) for id_, title, _ in shown_parts))
    said = tables.words(found)
    body = join(
        el(
            "header",
            el("h1", f"{found.name}: {' / '.join(entry.title for entry in found.entries)}"),
            el("p", said[0], cls="kind"),
            el("nav", contents, aria_label="On this page"),
        ),
        el(
            "main",
            *(el("p", f"{run} failed: {why}", cls="note") for run, why in found.failed.items()),
            *(
                el("section", el("h2", title, id=f"{id_}-title"), content, id=id_, aria_labelledby=f"{id_}-title")
                for id_, title, content in shown_parts
            ),
        ),
        el("footer", el("p", f"Written by lily {__version__}. The page holds no script and loads nothing.")),
    )
    return document(f"{found.name}: a comparison", body)


def _style(index: int) -> str:
    return f"l{index % charts.EXPERT_COLOURS}"


def _quality(found: Comparison) -> Html:
    lines = tables.quality(found)
    seeds = sorted({seed for entry in found.entries for seed in entry.seeds})
    by_seed = [[entry.title, *(_of_seed(entry, found.metric, seed) for seed in seeds)] for entry in found.entries]
    notes = [el("p", said) for said in tables.words(found)[1:] if " failed: " not in said]
    return join(
        table(f"On {found.rows:,} {found.split} rows", _headed(lines[0]), lines[1:]),
        *notes,
        _tests(found),
        details("Every seed", table(found.metric, ["method", *(f"seed {seed}" for seed in seeds)], by_seed)),
    )


def _headed(head: Sequence[str]) -> list[str]:
    """The columns with a name for the first too, which a screen reader reads out."""
    return ["method", *head[1:]]


def _of_seed(entry: Entry, metric: str, seed: int) -> str:
    return shown(metric, entry.values[metric][entry.seeds.index(seed)]) if seed in entry.seeds else "-"


def _tests(found: Comparison) -> Html | None:
    names = list(dict.fromkeys(name for entry in found.entries for name in entry.tests))
    if not names:
        return None
    rows = [
        [entry.title, *(tables.with_spread(found.metric, entry.tests[name][found.metric]) for name in names)]
        for entry in found.entries
    ]
    return table(f"{found.metric} on further test sets", ["method", *names], rows)


def _costs(found: Comparison) -> Html:
    lines = tables.costs(found)
    axes: list[tuple[str, str, Callable[[Entry], float]]] = [
        ("parameters", "trained parameters", lambda e: float(e.parameters)),
        ("time", "seconds of training", lambda e: e.seconds),
        ("memory", "peak memory (MB)", lambda e: e.peak_bytes / 1e6),
    ]
    figures = [_scatter(found, name, label, of) for name, label, of in axes]
    return join(table("Of one run", _headed(lines[0]), lines[1:]), el("div", *figures, cls="grid"))


def _scatter(found: Comparison, name: str, label: str, of: Callable[[Entry], float]) -> Html | None:
    factor = 1 if found.metric in LOWER_IS_BETTER else 100
    points, rows = [], []
    for i, entry in enumerate(found.entries):
        mean, deviation = entry.mean(found.metric) * factor, entry.spread(found.metric)
        spread = (deviation or 0.0) * factor
        if math.isfinite(mean):
            points.append(Point(entry.title, _style(i), of(entry), mean, mean - spread, mean + spread))
            told = "-" if deviation is None else f"{spread:.2g}"  # one seed has none
            rows.append([entry.title, f"{of(entry):,.0f}", f"{mean:.4g}", told])
    if not points:
        return None
    better = "lower" if found.metric in LOWER_IS_BETTER else "higher"
    said = f"{found.metric} by {label}; {better} is better, and further left is cheaper."
    if any(len(entry.seeds) > 1 for entry in found.entries):
        said += " Bars: one standard deviation."
    unit = found.metric if factor == 1 else f"{found.metric} (%)"
    title = f"Quality against {name}"
    numbers = table(title, ["method", label, unit, "standard deviation"], rows)
    return figure(title, charts.scatter(points, title, said, label, unit), said, numbers)


def _training(found: Comparison) -> Html | None:
    series = [
        Series(entry.title, _style(i), points)
        for i, entry in enumerate(found.entries)
        if (points := tuple((step, value) for step, value in entry.history if math.isfinite(value)))
    ]
    if not series:
        return None
    title = f"{found.metric} on the validation rows"
    said = "Mean over seeds, at each evaluation. The best one of each seed was kept."
    picture = charts.lines(series, title, said, "optimiser step", found.metric)
    last: list[list[Child]] = [
        [entry.title, *(shown(found.metric, statistics.fmean(values)) for values in (entry.best, entry.last))]
        for entry in found.entries
        if entry.last and entry.best
    ]
    heads = ["method", "best epoch", "last epoch"]
    made = table(f"{found.metric} on the validation rows, mean over seeds", heads, last)
    return join(el("div", curve_figure(title, picture, series, said, "step"), cls="grid"), made)


def _tuning(found: Comparison) -> Html | None:
    tuning = found.setting.get("tuning")
    if not tuning:
        return None
    out: list[Html] = []
    titles = {entry.name: entry.title for entry in found.entries}
    for name, chosen in tuning.items():
        if chosen["trials"]:
            title = titles.get(name, name)
            rows = [_trial(found.metric, trial, chosen) for trial in chosen["trials"]]
            heads = ["learning rate", "scale", f"{found.metric}, validation", "choice"]
            out.append(details(f"{title}: {len(rows)} runs", table(title, heads, rows)))
    said = (
        "For every method the same search, with one seed: the learning rate at the recipe's own scale, half, once and "
        "twice the recipe's, further for as long as the best lies at an end; then the scale in the same way."
    )
    return join(el("p", said), *out)


def _trial(metric: str, trial: dict[str, float | None], chosen: dict[str, float | None]) -> Sequence[Child]:
    is_chosen = all(trial[name] == chosen[name] for name in ("learning_rate", "scale"))
    scale, value = trial["scale"], trial[metric]
    return [
        f"{trial['learning_rate']:g}",
        "-" if scale is None else f"{scale:g}",
        "failed" if value is None else shown(metric, value),
        "chosen" if is_chosen else "",
    ]


def _reading(found: Comparison) -> Html:
    spread = any(len(entry.seeds) > 1 for entry in found.entries)
    pairs = [pair for pair in READING if spread or pair[0] != "±"]
    return el("dl", *(el(tag, said) for pair in pairs for tag, said in zip(("dt", "dd"), pair, strict=True)))
