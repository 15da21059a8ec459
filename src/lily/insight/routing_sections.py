"""The section about the routers: weights, what they depend on, classes, agreement, and training."""

from __future__ import annotations

from dataclasses import astuple

from lily.analysis.factored import grouped
from lily.analysis.routing import PERMUTATIONS, RoutingReport
from lily.analysis.sentences import most_by_label, routing_words, short_names, title_of
from lily.analysis.series import by_expert
from lily.html import charts
from lily.html.charts import Series
from lily.html.matrices import heat_map
from lily.html.page import Block, Details, Figure, Heading, Legend, Multiples, Panel, Table
from lily.insight.gather import Insight
from lily.insight.sections import by_columns, layer_figure, number

MOST_LAYERS = 6  # shown with their weights by class
MOST_CLASSES = 12

PARTS = (
    ("token", "e0", "token within the sample"),
    ("sample", "e2", "sample within its class"),
    ("label", "e1", "class"),
)
DEPENDS = (
    "Variance of the expert weights over tokens, summed over experts, split exactly into what it depends on. A layer "
    "without a bar uses the same weights for all data."
)
P_VALUE = (
    f"p: share of {PERMUTATIONS} random labelings (and the true one) in which the class explains at least as much, for "
    "each layer alone; of 20 layers, one falls below 0.05 by chance."
)
AGREEMENT = (
    "Agreement: 1 minus the total variation distance of two layers' mean weights. Correlation: of the mean weights of "
    "their samples; 1 for layers that react to the samples in the same way."
)


def routing(insight: Insight) -> list[Block]:
    """Expert weights, what they depend on, classes, agreement, and training."""
    report = insight.routing
    if report is None or not any(len(layer.mean) > 1 for layer in report.layers):
        return []
    return [
        routing_words(report),
        *_heat_maps(report),
        *_depends(report),
        *_classes(report),
        _layers(report),
        *_agreement(report),
        *_history(insight),
    ]


def _heat_maps(report: RoutingReport) -> list[Multiples]:
    panels, tables = [], []
    darkest = max(w for layer in report.layers if len(layer.mean) > 1 for w in layer.mean)
    for group, layers in grouped(report.layers).items():
        values = by_expert(layers)
        if len(values) == 1:
            continue
        names, rows = short_names([v.name for v in layers]), [f"B{e}" for e in range(len(values))]
        words = f"Equal weights would be {1 / len(values):.2f}."
        chart = heat_map(rows, names, values, f"Routers of {group}", words, "layer", darkest, charts.SMALL)
        panels.append(Panel(group, chart, words))
        numbers = [[v.name, *(f"{w:.3f}" for w in v.mean)] for v in layers]
        tables.append(Table(f"Mean expert weights in {group}", ["layer", *rows], numbers))
    caption = f"Mean weight of each expert in each layer. The shade goes from 0 to {darkest:.2f} in all groups."
    return [Multiples("Which experts each layer uses", panels, caption, tables)]


def _depends(report: RoutingReport) -> list[Figure]:
    layers = [v for v in report.layers if v.tokens and v.variance is not None]
    if not layers:
        return []
    parts = list(PARTS)
    if not report.compares_labels:
        parts = [(part, style, name.removesuffix(" within its class")) for part, style, name in PARTS[:2]]
    columns = by_columns(layers)
    series = [(name, style, [getattr(v.variance, part) for v in columns[1]]) for part, style, name in parts]
    title, unit = "What the weights depend on", "variance of the weights"
    return [layer_figure(columns, series, title, DEPENDS, DEPENDS, unit, ".5f", "box")]


def _classes(report: RoutingReport) -> list[Block]:
    """Weights by class of the layers that depend on it most."""
    rows = []
    for layer in most_by_label([v for v in report.layers if v.labels])[:MOST_LAYERS]:
        v = layer.variance
        assert v is not None
        by_class = {name: " ".join(f"{w:.2f}" for w in mean) for name, mean in sorted(layer.labels.items())}
        weights = "; ".join(f"{name}: {means}" for name, means in by_class.items())
        shares = [f"{v.share(part):.1%}" for part in ("label", "label_by_chance")]
        rows.append([layer.name, weights, *shares, f"{v.p_value:.3f}"])
    if not rows or len(report.labels) > MOST_CLASSES:
        return []
    heads = ["layer", "mean weights by class (B0 B1 ...)", "of the variance", "by chance", "p"]
    table = Table("Layers whose routing depends most on the class", heads, rows, numbers_from=2)
    return [Heading("Routing by class"), table, P_VALUE]


def _layers(report: RoutingReport) -> Details:
    rows = []
    for v in (layer for layer in report.layers if len(layer.mean) > 1):
        entropies = [f"{v.effective_experts:.2f}", f"{v.entropy:.3f}", f"{v.token_entropy:.3f}"]
        dead = ", ".join(f"B{e}" for e in v.dead()) or "none"
        rows.append([v.name, *entropies, f"{v.specialisation:.4f}", dead])
    heads = ["layer", "experts used", "entropy of the mean", "mean entropy of a token", "specialization", "dead"]
    caption = "Entropies in nats; experts used is exp of the entropy of the mean"
    return Details("Entropy, specialization and dead experts by layer", Table(caption, heads, rows))


def _agreement(report: RoutingReport) -> list[Block]:
    rows = [[str(group), *map(number, means)] for group, *means in map(astuple, report.agreements)]
    if not rows:
        return []
    heads = ["group", "share an A", "others", "correlation: share an A", "correlation: others"]
    table = Table("Means over pairs of layers of a group", heads, rows)
    return [Heading("Do layers that share an A route alike?"), table, AGREEMENT]


def _history(insight: Insight) -> list[Block]:
    history, plan = insight.history, insight.plan
    if history is None or plan is None or not history.steps:
        return []
    panels, tables, legend = [], [], None
    for group in plan.groups:
        members = [name for name in group.members if name in history.layers and any(history.tokens[name])]
        if not members or group.num_B == 1:
            continue
        short = dict(zip(group.members, short_names(group.members), strict=True))
        many = len(members) > charts.EXPERT_COLORS
        series = []
        for i, name in enumerate(members):
            style = charts.depth_style(i, len(members)) if many else f"l{i}"
            points = tuple(zip(map(float, history.steps), history.largest(name), strict=True))
            series.append(Series(f"layer {short[name]}", style, points))
        title, words = title_of(group), f"Equal weights would be {1 / group.num_B:.2f}."
        highest = max(value for s in series for _, value in s.points if value is not None)
        y = (1 / group.num_B, max(highest, 1.2 / group.num_B))
        label = f"Deciding: {title}"
        chart = charts.lines(series, label, words, "optimizer step", "largest mean weight", y=y, width=charts.SMALL)
        rows = [[name, *(f"{w:.3f}" for w in history.accumulated(name))] for name in members]
        heads = ["layer", *(f"B{e}" for e in range(group.num_B))]
        if legend is None or len(series) > len(legend.entries):
            legend = Legend([(s.style, s.name) for s in series], "depth" if many else "line")
        assert chart is not None, "the layer that was recorded has a value"
        panels.append(Panel(title, chart, words))
        tables.append(Table(f"Mean weights over all recorded steps in {title}", heads, rows))
    caption = "Mean weight of the most used expert at each recorded step, by layer."
    figure = Multiples("How the routers decide, by group of layers", panels, caption, tables, legend)
    return [Heading("While it learned"), figure] if panels else []
