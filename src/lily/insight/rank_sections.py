"""The sections about rank and about what sharing did to the layers' subspaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from statistics import median
from typing import Any

from lily.analysis.rank import Overlap, RankReport
from lily.analysis.sentences import overlap_words, rank_words
from lily.analysis.series import ranks_by_layer, relative_spectra
from lily.html import charts
from lily.html.charts import Series
from lily.html.page import Block, Figure, Grid, Table, curve_figure
from lily.insight.gather import Insight
from lily.insight.sections import by_columns, layer_figure, number

OVERLAP = (
    "The overlap of two layers is the mean squared cosine of the principal angles between their subspaces. By chance: "
    "the value for random subspaces of these sizes."
)
# Title, caption, x and y of the charts of curves.
SPECTRUM = (
    "Spectrum",
    "Singular values of the expected update as shares of the layer's largest: median over layers, shaded from the "
    "smallest to the largest. A slow fall uses the rank; a steep one wastes it.",
    "direction",
    "singular value / largest",
)
ENERGY = (
    "Energy",
    "Share of an update's squared norm in its first directions: median over layers, shaded from the smallest to the "
    "largest. An update that reaches 1 early could be cut to a smaller rank.",
    "first directions",
    "share of squared norm",
)


def rank(insight: Insight) -> list[Block]:
    """Ranks of all layers and the spectrum, beside LoRA's."""
    report = insight.rank
    if report is None:
        return []
    own = ("LoRA", "lora") if insight.facts["kind"] == "LORA adapter" else ("Lily", "lily")
    numerical = f"Singular values above {report.threshold:g} of the layer's largest."
    effective = (
        "exp of the entropy of the singular values: how many directions carry the update, counted by their size."
    )
    curves = [(*own, report)]
    if insight.lora is not None:
        curves.append(("LoRA trained beside it", "lora", insight.lora))
    threshold = report.threshold
    axis = {"y": (min(threshold / 10, 10**-3), 1.0), "log": True, "levels": [(threshold, f"threshold {threshold:g}")]}
    spectrum = _over_layers(curves, relative_spectra, SPECTRUM, **axis)
    return [
        rank_words(report, insight.lora, insight.equal_lora),
        _rank_figure(insight, report, own, "numerical_rank", numerical),
        _rank_figure(insight, report, own, "effective_rank", effective),
        Grid([*spectrum, *_over_layers(curves, _energies, ENERGY, y=(0.0, 1.0))]),
    ]


def _rank_figure(insight: Insight, report: RankReport, own: tuple[str, str], what: str, caption: str) -> Figure:
    equal = insight.equal_lora
    looks = {
        "expected": (f"{own[0]}, expected update", own[1]),
        "union": ("Lily, union over tokens", "union"),
        "lora": ("LoRA trained beside it", "lora"),
    }
    columns = by_columns(report.layers)
    report = replace(report, layers=tuple(columns[1]))
    series = [(*looks[which], values) for which, values in ranks_by_layer(report, insight.lora, what).items()]
    if insight.lora is None and equal is not None and what == "numerical_rank":
        series.append(("LoRA of as many parameters, at most", "lora", [float(equal)] * len(report.layers)))
    title = f"{what.removesuffix('_rank').capitalize()} rank by layer"
    words = rank_words(report, insight.lora, equal)
    return layer_figure(columns, series, title, words, caption, "rank (directions)", ".4g")


def _over_layers(
    curves: Sequence[tuple[str, str, RankReport]],
    values: Callable[[RankReport], Sequence[Sequence[float]]],
    labels: tuple[str, str, str, str],
    **axis: Any,
) -> list[Figure]:
    """Median over layers, and a band from the smallest to the largest, by direction; labels: title, caption, x, y."""
    series = []
    for name, style, report in curves:
        columns = [[v for v in column if v is not None] for column in zip_longest(*values(report))]
        if columns:
            band = tuple((float(x), min(c), max(c)) for x, c in enumerate(columns, 1))
            series.append(Series(name, style, tuple((float(x), median(c)) for x, c in enumerate(columns, 1)), band))
    chart = charts.lines(series, *labels, **axis)
    return [curve_figure(chart, series, labels[2])] if chart is not None else []


def _energies(report: RankReport) -> list[tuple[float, ...]]:
    return [layer.expected.energy for layer in report.layers if layer.expected.energy_total]


def overlap(insight: Insight) -> list[Block]:
    """Subspaces that layers have in common, beside LoRA's."""
    report = insight.rank
    if report is None or not report.overlaps:
        return []
    lora = {} if insight.lora is None else {o.group: o for o in insight.lora.overlaps}
    heads = ["group", "layers that share an A", "other layers", "by chance"]
    heads += ["LoRA beside it", "by chance"] if lora else []

    def table(what: str, caption: str) -> Table:
        def others(o: Overlap | None) -> list[str]:
            return ["-", "-"] if o is None else [number(o.mean(what, False)), number(getattr(o, f"{what}_by_chance"))]

        rows = [[o.group, number(o.mean(what, True)), *others(o)] for o in report.overlaps]
        if lora:
            rows = [[*row, *others(lora.get(row[0]))] for row in rows]
        return Table(caption, heads, rows)

    return [
        overlap_words(report),
        OVERLAP,
        table("rows", "Input directions that two layers of a group both read (row spaces), mean over pairs"),
        table("columns", "Output directions that they both write (column spaces)"),
    ]
