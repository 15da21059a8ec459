"""The sections about rank and about what sharing did to the layers' subspaces."""

from __future__ import annotations

from statistics import median

from lily.analysis.rank import LayerRank, RankReport, Spectrum
from lily.analysis.sentences import overlap_words, rank_words, short_names
from lily.html import charts
from lily.html.charts import Series
from lily.html.common import curve_figure, label
from lily.html.markup import Html, el, figure, join, table
from lily.insight.gather import Insight


def rank(told: Insight) -> Html | None:
    """Ranks of all layers and the spectrum, beside LoRA's."""
    report = told.rank
    if report is None:
        return None
    words = rank_words(report, told.lora, told.equal_lora)
    own = "LoRA" if told.facts["kind"] == "LORA adapter" else "Lily"
    return join(
        el("p", words),
        _rank_figure(report, told.lora, told.equal_lora, own, "numerical_rank", words),
        _rank_figure(report, told.lora, told.equal_lora, own, "effective_rank", words),
        el("div", _spectrum(report, told.lora, own), _energy(report, told.lora, own), cls="grid"),
    )


def _rank_figure(
    report: RankReport, lora: RankReport | None, equal: int | None, own: str, what: str, words: str
) -> Html:
    def value(spectrum: Spectrum) -> float:
        number = spectrum.numerical_rank(report.threshold) if what == "numerical_rank" else spectrum.effective_rank
        return float(number)

    groups: dict[str, list[LayerRank]] = {}
    for layer in report.layers:
        groups.setdefault(layer.group, []).append(layer)
    ordered = [layer for members in groups.values() for layer in members]
    series: list[tuple[str, str, list[float | None]]] = [
        (f"{own}, expected update", "lora" if own == "LoRA" else "lily", [value(v.expected) for v in ordered])
    ]
    if any(v.union is not None for v in ordered) and not report.assumed:
        series.append(("Lily, union over tokens", "union", [value(v.union) if v.union else None for v in ordered]))
    if lora is not None:
        found = {v.name: value(v.expected) for v in lora.layers}
        series.append(("LoRA trained beside it", "lora", [found.get(v.name) for v in ordered]))
    elif equal is not None and what == "numerical_rank":
        series.append(("LoRA of as many parameters, at most", "lora", [float(equal)] * len(ordered)))
    title = "Numerical rank by layer" if what == "numerical_rank" else "Effective rank by layer"
    named = [(label(g, groups), short_names([v.name for v in members])) for g, members in groups.items()]
    picture = charts.by_layer(named, series, title, words, "rank (directions)")
    numbers = table(
        title,
        ["layer", *(name for name, _, _ in series)],
        [[v.name, *("-" if s[2][i] is None else f"{s[2][i]:.4g}" for s in series)] for i, v in enumerate(ordered)],
    )
    explained = (
        f"Singular values above {report.threshold:g} of the layer's largest."
        if what == "numerical_rank"
        else "exp of the entropy of the singular values: how many directions carry the update, counted by their size."
    )
    shown_ = join(
        el("div", picture, cls="wide", tabindex="0", role="group", aria_label=title),
        charts.legend([(style, name) for name, style, _ in series], "dot"),
    )
    return figure(title, shown_, explained, numbers)


def _curves(report: RankReport, of: str) -> tuple[list[float], list[float], list[float]]:
    """Median, least and largest over layers of the relative singular values, or of the energy; by index."""
    rows = []
    for layer in report.layers:
        s = layer.expected
        if s.energy_total:
            rows.append([v / s.values[0] for v in s.values] if of == "spectrum" else list(s.energy))
    length = max((len(row) for row in rows), default=0)
    columns = [[row[i] for row in rows if i < len(row)] for i in range(length)]
    return [median(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def _both(report: RankReport, lora: RankReport | None, own: str, of: str) -> list[Series]:
    out = []
    for name, style, found in (
        (own, "lora" if own == "LoRA" else "lily", report),
        ("LoRA trained beside it", "lora", lora),
    ):
        if found is None:
            continue
        middle, low, high = _curves(found, of)
        points = tuple((float(i), v) for i, v in enumerate(middle, 1))
        band = tuple((float(i), a, b) for i, (a, b) in enumerate(zip(low, high, strict=True), 1))
        out.append(Series(name, style, points, band))
    return [s for s in out if s.points]


def _spectrum(report: RankReport, lora: RankReport | None, own: str) -> Html | None:
    series = _both(report, lora, own, "spectrum")
    if not series:
        return None
    said = (
        "Singular values of the expected update as shares of the layer's largest: median over layers, shaded from the "
    )
    said += "smallest to the largest. A slow fall uses the rank; a steep one wastes it."
    lowest = min(report.threshold / 10, 10**-3)
    picture = charts.lines(
        series,
        "Spectrum",
        said,
        "direction",
        "singular value / largest",
        y=(lowest, 1.0),
        log=True,
        level=(report.threshold, f"threshold {report.threshold:g}"),
    )
    return curve_figure("Spectrum", picture, series, said, "direction")


def _energy(report: RankReport, lora: RankReport | None, own: str) -> Html | None:
    series = _both(report, lora, own, "energy")
    if not series:
        return None
    said = "Share of an update's squared norm in its first directions: median over layers, shaded from the smallest to "
    said += "the largest. An update that reaches 1 early could be cut to a smaller rank."
    picture = charts.lines(series, "Energy", said, "first directions", "share of squared norm", y=(0.0, 1.0))
    return curve_figure("Energy", picture, series, said, "first directions")


def overlap(told: Insight) -> Html | None:
    """Subspaces that layers have in common, beside LoRA's."""
    report = told.rank
    if report is None or not report.overlaps:
        return None

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    beside = {} if told.lora is None else {o.group: o for o in told.lora.overlaps}

    def overlaps(what: str, caption: str) -> Html:
        heads = ["group", "layers that share an A", "other layers", "by chance"]
        rows = []
        for o in report.overlaps:
            row = [o.group, cell(o.mean(what, True)), cell(o.mean(what, False)), cell(getattr(o, f"{what}_by_chance"))]
            if beside:
                lora = beside.get(o.group)
                row += (
                    ["-", "-"]
                    if lora is None
                    else [cell(lora.mean(what, False)), cell(getattr(lora, f"{what}_by_chance"))]
                )
            rows.append(row)
        return table(caption, [*heads, *(["LoRA beside it", "by chance"] if beside else [])], rows)

    return join(
        el("p", overlap_words(report)),
        el(
            "p",
            "The overlap of two layers is the mean squared cosine of the principal angles between their subspaces. By "
            "chance: what random subspaces of these sizes have.",
        ),
        overlaps("rows", "Input directions that two layers of a group both read (row spaces), mean over pairs"),
        overlaps("columns", "Output directions that they both write (column spaces)"),
    )
