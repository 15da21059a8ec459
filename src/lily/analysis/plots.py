"""Figures of an adapter with matplotlib.

Papers and notebooks need figures in any file format and size, so sharing, routers and rank are drawn here as well as in
the page of `lily inspect`, both from the numbers of `lily.analysis.series`.

Each function returns a `Picture`: a matplotlib figure and its alternative text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

from lily.analysis.factored import grouped
from lily.analysis.forgetting import Outcome, by_contestant, frontier
from lily.analysis.granularity import Point, Quality
from lily.analysis.rank import RankReport
from lily.analysis.routing import RoutingReport
from lily.analysis.scaling import Tried
from lily.analysis.seeds import spread
from lily.analysis.sentences import rank_words, routing_words, sharing_words, short_names, title_of
from lily.analysis.series import block_sizes, by_expert, ranks_by_layer, relative_spectra
from lily.errors import LilyError
from lily.io.atomic import new_file
from lily.plan.sharing_plan import SharingPlan

COLORS = ("#7fb2e5", "#f2b56b", "#8fcf9f", "#e59bb6", "#c5b3e6", "#d9cf7a", "#9fd3d6", "#d3b29a")
LINES = ("#2f6fb0", "#a8650a", "#2f7d43", "#a83f6c", "#6a4fb0", "#7a6d10", "#1f7a80", "#855a38")
ACROSS = 3  # panels side by side
LILY, UNION, LORA = "#6d35a5", "#0b7a75", "#b4540a"


@dataclass(frozen=True)
class Picture:
    """A figure and its description.

    Attributes:
        figure: a matplotlib figure.
        alt: alternative text, for a page's `alt` attribute.
    """

    figure: Any
    alt: str

    def save(self, file: str | Path, overwrite: bool = False) -> None:
        """Write the figure in the format of the file's extension; SVGs keep text as text and are reproducible.

        Raises:
            LilyError: if the file exists, or matplotlib does not support its extension.
        """
        from matplotlib import rc_context

        with new_file(file, overwrite) as path, rc_context({"svg.fonttype": "none", "svg.hashsalt": "lily"}):
            try:
                self.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
            except ValueError as error:
                raise LilyError(f"{file}: {error}") from None


def new_figure(width: float, height: float) -> Any:
    """An empty figure; the sizes are in inches.

    Raises:
        LilyError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LilyError('a plot needs matplotlib; pip install "lily-peft[plots]"') from None
    return Figure(figsize=(width, height), layout="constrained")


def rank_plot(report: RankReport, lora: RankReport | None = None, name: str = "Lily") -> Picture:
    """Numerical rank by layer, and the spectrum, compared with a LoRA's.

    Args:
        report: report of the adapter.
        lora: report of a LoRA to compare with.
        name: name of the adapter, for the legend.
    """
    figure = new_figure(11, 4)
    ranks, spectrum = figure.subplots(1, 2, width_ratios=(3, 2))
    numbers = range(len(report.layers))
    looks = {
        "expected": {"marker": "o", "color": LILY, "label": f"{name}, expected update"},
        "union": {"marker": "o", "color": UNION, "fillstyle": "none", "label": f"{name}, union over tokens"},
        "lora": {"marker": "D", "color": LORA, "label": "LoRA"},
    }
    for which, values in ranks_by_layer(report, lora).items():
        ranks.plot(numbers, [nan if v is None else v for v in values], linestyle="none", **looks[which])
    ranks.set(xlabel="adapted layer, in the model's order of groups", ylabel="numerical rank (directions)")
    ranks.set_ylim(bottom=0)
    ranks.legend()
    for drawn, color, label in ((report, LILY, name), (lora, LORA, "LoRA")):
        for i, shares in enumerate(relative_spectra(drawn) if drawn is not None else ()):
            each = None if i else f"{label}, each layer"
            spectrum.plot(range(1, len(shares) + 1), shares, color=color, alpha=0.35, linewidth=1, label=each)
    spectrum.axhline(report.threshold, color="#565d69", linestyle="--", label=f"threshold {report.threshold:g}")
    spectrum.set(yscale="log", xlabel="direction", ylabel="singular value / largest")
    if spectrum.get_legend_handles_labels()[0]:
        spectrum.legend()
    return Picture(figure, rank_words(report, lora))


def router_plot(report: RoutingReport) -> Picture:
    """Mean expert weights by layer and expert, one panel per group."""
    groups = {g: v for g, v in grouped(report.layers).items() if len(v[0].mean) > 1}
    if not groups:
        raise LilyError("there is one B in each group, so nothing is routed and there is no router to draw")
    across = min(ACROSS, len(groups))
    down = -(-len(groups) // across)
    height = 0.5 + 0.5 * max(len(v[0].mean) for v in groups.values()) + 1.2
    figure = new_figure(4.2 * across, height * down)
    every = list(figure.subplots(down, across, squeeze=False).flat)
    panels = every[: len(groups)]
    for panel in every[len(groups) :]:
        panel.remove()
    for panel, (group, layers) in zip(panels, groups.items(), strict=True):
        table = by_expert(layers)
        image = panel.imshow(table, vmin=0, vmax=1, cmap="Purples", aspect="auto")
        panel.set(title=group, xlabel="layer")
        panel.set_xticks(range(len(layers)), short_names([v.name for v in layers]))
        panel.set_yticks(range(len(table)), [f"B{e}" for e in range(len(table))])
    figure.colorbar(image, ax=panels, label="mean weight")
    return Picture(figure, routing_words(report))


def sharing_plot(plan: SharingPlan, report: RoutingReport | None = None) -> Picture:
    """Which layers share which A (boxes), and how each mixes the experts of its group (bands).

    Args:
        plan: the sharing plan.
        report: for the heights of the bands; default: equal.
    """
    routing = grouped(report.layers) if report is not None else {}
    figure = new_figure(4.2 * len(plan.groups), 3.4)
    panels = figure.subplots(1, len(plan.groups), squeeze=False)[0]
    for panel, group in zip(panels, plan.groups, strict=True):
        at = 0
        for number, size in block_sizes(plan, group):
            panel.barh(1.14, size - 0.08, left=at - 0.46, height=0.18, color="#efe8f6", edgecolor=LILY)
            panel.text(at + size / 2 - 0.5, 1.14, f"A{number}", ha="center", va="center")
            at += size
        layers = routing.get(title_of(group))
        for e in range(group.num_B):
            shares = [v.mean[e] for v in layers] if layers else [1 / group.num_B] * at
            bottom = [sum(v.mean[:e]) for v in layers] if layers else [e / group.num_B] * at
            panel.bar(range(at), shares, 0.92, bottom, color=COLORS[e % len(COLORS)], label=f"B{e}")
        panel.set(title=title_of(group), xlabel="layer", ylabel="share of each expert", yticks=[0, 0.5, 1])
        panel.set_xticks(range(at), short_names(group.members))
        panel.legend(loc="lower right")
    return Picture(figure, " ".join(f"{title_of(g)}: {sharing_words(g)}" for g in plan.groups))


def granularity_plot(points: Sequence[Point]) -> Picture:
    """The shapes within one budget: rank against the number of A, one line per number of B."""
    figure = new_figure(6, 4)
    panel = figure.subplots()
    for i, experts in enumerate(sorted({p.num_B for p in points})):
        chosen = sorted((p for p in points if p.num_B == experts), key=lambda p: p.num_A)
        panel.plot([p.num_A for p in chosen], [p.r for p in chosen], "o-", color=LINES[i % len(LINES)],
                   label=f"num_B = {experts}")  # fmt: skip
    panel.set(xlabel="num_A (A per group)", ylabel="r (rank)", ylim=(0, None))
    panel.legend()
    best, least = max(points, key=lambda p: p.r), min(points, key=lambda p: p.r)
    alt = (
        f"{len(points)} shapes of {least.share:.0%} to {best.share:.0%} of one budget: from rank {best.r} with num_A="
        f"{best.num_A} and num_B={best.num_B} to rank {least.r} with num_A={least.num_A} and num_B={least.num_B}."
    )
    return Picture(figure, alt)


def quality_plot(
    shapes: Sequence[Quality], metric: str, lora: Sequence[float] = (), by_experts: bool = False
) -> Picture:
    """Quality against granularity, as in the paper's Fig. 5: all shapes have equal size.

    Args:
        shapes: the shapes with their values.
        metric: name and unit, for the axis.
        lora: values of a LoRA of equal size.
        by_experts: draw one line per num_B, for shapes with unequal num_A and num_B.
    """
    if not shapes:
        raise LilyError("no shape has a value, so there is nothing to draw")
    figure = new_figure(6.4, 4)
    panel = figure.subplots()
    lines = sorted({p.num_B for p in shapes}) if by_experts else [None]
    for i, experts in enumerate(lines):
        points = sorted((p for p in shapes if experts is None or p.num_B == experts), key=lambda p: p.r)
        label = "Lily, num_A = num_B" if experts is None else f"Lily, num_B = {experts}"
        means, spreads = [fmean(p.values) for p in points], [spread(p.values) or 0.0 for p in points]
        color = LILY if experts is None else LINES[i % len(LINES)]
        panel.errorbar([p.r for p in points], means, spreads, fmt="o-", capsize=3, color=color, label=label)
        for p in points:
            text = f"{p.num_A}" if p.num_A == p.num_B and experts is None else f"A{p.num_A} B{p.num_B}"
            panel.annotate(text, (p.r, fmean(p.values)), xytext=(4, 5), textcoords="offset points", fontsize=8)
    if lora:
        panel.axhline(fmean(lora), color=LORA, linestyle="--", label="LoRA of equal size")
        half = spread(lora) or 0.0
        panel.axhspan(fmean(lora) - half, fmean(lora) + half, color=LORA, alpha=0.12)
    ranks = sorted({p.r for p in shapes})
    panel.set_xscale("log")
    panel.set_xticks(ranks, [str(r) for r in ranks])
    panel.minorticks_off()
    panel.set(xlabel="r (rank); labels: number of A and B", ylabel=metric)
    panel.legend()
    by_rank = sorted(shapes, key=lambda p: -p.r)
    words = ", ".join(f"{fmean(p.values):.4g} at r={p.r}, num_A={p.num_A}, num_B={p.num_B}" for p in by_rank)
    compared = f" LoRA of equal size: {fmean(lora):.4g}." if lora else ""
    return Picture(figure, f"{metric} of {len(shapes)} shapes of equal size: {words}.{compared}")


def forgetting_plot(outcomes: Sequence[Outcome], metric: str) -> Picture:
    """Quality against forgetting: every setting as a dot, and each contestant's Pareto front as a line.

    Args:
        outcomes: outcomes of all contestants.
        metric: name and unit of the quality, for the axis.
    """
    if not outcomes:
        raise LilyError("nothing was trained, so there is nothing to draw")
    figure = new_figure(6.8, 4.4)
    panel = figure.subplots()
    texts = []
    for i, (name, own) in enumerate(by_contestant(outcomes).items()):
        color = LINES[i % len(LINES)]
        panel.plot([o.forgetting for o in own], [o.quality for o in own], "o", color=color, alpha=0.3, markersize=4)
        line = frontier(own)
        panel.plot([o.forgetting for o in line], [o.quality for o in line], ".-", color=color, label=name,
                   drawstyle="steps-post")  # fmt: skip
        texts.append(f"{name} from {line[0].quality:.4g} at {line[0].forgetting:+.3g} to {line[-1].quality:.4g} at "
                    f"{line[-1].forgetting:+.3g}")  # fmt: skip
    panel.set(xlabel="forgetting: increase of the loss on general text (nats per token)", ylabel=metric)
    panel.legend()
    return Picture(figure, f"{metric} against forgetting; Pareto fronts: {'; '.join(texts)}.")


def curves_plot(panels: Mapping[str, Mapping[str, Sequence[tuple[float, Sequence[float]]]]], x: str, y: str) -> Picture:
    """Values over a quantity on a logarithmic axis: one panel per task, one line per contestant.

    Args:
        panels: title -> contestant -> points (x, the values of all seeds), in any order.
        x: name and unit of the quantity.
        y: name and unit of the values.
    """
    if not any(panels.values()):
        raise LilyError("nothing was trained, so there is nothing to draw")
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(5.2 * across, 3.8 * down)
    axes = [panel for row in figure.subplots(down, across, squeeze=False) for panel in row]
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    texts = []
    for panel, (title, lines) in zip(axes, panels.items(), strict=False):
        for name, points in lines.items():
            color = "black" if name.startswith("LoRA") else LINES[names.index(name) % len(LINES)]
            ordered = sorted(points)
            means = [fmean(values) for _, values in ordered]
            panel.errorbar([at for at, _ in ordered], means, [spread(values) or 0.0 for _, values in ordered],
                           fmt="o-", markersize=4, capsize=3, color=color, label=name)  # fmt: skip
            best = min(range(len(means)), key=means.__getitem__)
            texts.append(f"{title}, {name}: lowest {means[best]:.4g} at {ordered[best][0]:g}")
        panel.set(title=title, xlabel=x, ylabel=y, xscale="log")
    for panel in axes[len(panels) :]:
        panel.remove()
    axes[0].legend(fontsize=8)
    return Picture(figure, f"{y} over {x}. {'; '.join(texts)}.")


def settings_plot(settings: Mapping[str, Sequence[Tried]], metric: str) -> Picture:
    """Quality by learning rate (x) and scale (y): one row of panels per task, one panel per contestant.

    Args:
        settings: task -> its settings.
        metric: name and unit of the quality, for the color bar.
    """
    if not any(settings.values()):
        raise LilyError("nothing was trained, so there is nothing to draw")
    contestants = list(dict.fromkeys(t.contestant for own in settings.values() for t in own))
    figure = new_figure(4.2 * len(contestants) + 0.8, 3.0 * len(settings))
    rows = figure.subplots(len(settings), len(contestants), squeeze=False)
    texts = []
    for (task, tried), panels in zip(settings.items(), rows, strict=True):
        low, high = min(t.quality for t in tried), max(t.quality for t in tried)
        rates, scales = sorted({t.rate for t in tried}), sorted({t.scale for t in tried})
        for contestant, panel in zip(contestants, panels, strict=True):
            own = {(t.scale, t.rate): t.quality for t in tried if t.contestant == contestant}
            table = [[own.get((scale, rate), float("nan")) for rate in rates] for scale in scales]
            image = panel.imshow(table, vmin=low, vmax=high, cmap="Purples", aspect="auto", origin="lower")
            for y, values in enumerate(table):
                for x, value in enumerate(values):
                    dark = value > (low + high) / 2
                    panel.text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
            panel.set(title=f"{task}: {contestant}", xlabel="learning rate", ylabel="scale of the update")
            panel.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            panel.set_yticks(range(len(scales)), [f"{scale:g}" for scale in scales])
            if own:
                (scale, rate), best = max(own.items(), key=lambda pair: pair[1])
                texts.append(f"{task}, {contestant}: best {best:.4g} at learning rate {rate:g} and scale {scale:g}")
        figure.colorbar(image, ax=list(panels), label=metric)
    return Picture(figure, f"{metric} by learning rate and scale. {'; '.join(texts)}.")
