"""The section about the routers: weights, what they depend on, classes, agreement, and training."""

from __future__ import annotations

from lily.analysis.routing import LayerRouting, RoutingReport
from lily.analysis.sentences import most_by_label, routing_words, short_names, title_of, weights_by_group
from lily.html import charts
from lily.html.charts import Series
from lily.html.common import label
from lily.html.markup import Html, details, el, figure, join, table
from lily.insight.gather import Insight

MOST_CLASSES = 6  # layers shown with their weights by class


def routing(told: Insight) -> Html | None:
    """Expert weights, what they depend on, classes, agreement, and training."""
    report = told.routing
    if report is None or not any(len(layer.mean) > 1 for layer in report.layers):
        return None
    return join(
        el("p", routing_words(report)),
        el("div", *_heat_maps(report), cls="grid"),
        _depends(report),
        _classes(report),
        _layers(report),
        _agreement(report),
        _history(told),
    )


def _heat_maps(report: RoutingReport) -> list[Html]:
    out = []
    darkest = max(w for layer in report.layers if len(layer.mean) > 1 for w in layer.mean)
    for group, layers in weights_by_group(report).items():
        experts = len(layers[0].mean)
        if experts == 1:
            continue
        names, rows = short_names([v.name for v in layers]), [f"B{e}" for e in range(experts)]
        values = [[layer.mean[e] for layer in layers] for e in range(experts)]
        said = (
            f"Mean weight of each expert in each layer of {group}; equal weights would be {1 / experts:.2f}. The shade "
            f"goes from 0 to {darkest:.2f} in all groups."
        )
        picture = charts.heat_map(rows, names, values, f"Routers of {group}", said, "layer", darkest)
        numbers = table(said, ["layer", *rows], [[v.name, *(f"{w:.3f}" for w in v.mean)] for v in layers])
        out.append(figure(f"Routers of {group}", picture, said, numbers))
    return out


PARTS = (
    ("token", "e0", "token within the sample"),
    ("sample", "e2", "sample within its class"),
    ("label", "e1", "class"),
)


def _depends(report: RoutingReport) -> Html | None:
    layers = [v for v in report.layers if v.tokens and v.variance is not None]
    if not layers:
        return None
    labelled = report.compares_labels
    parts = [(p, style, name if labelled else name.removesuffix(" within its class")) for p, style, name in PARTS]
    parts = parts if labelled else parts[:2]
    groups: dict[str, list[LayerRouting]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    ordered = [v for members in groups.values() for v in members]
    series = [(name, style, [getattr(v.variance, p) for v in ordered]) for p, style, name in parts]
    said = "Variance of the expert weights over tokens, summed over experts, split exactly into what it depends on. A "
    said += "layer without a bar mixes its experts alike whatever the data."
    named = [(label(g, groups), short_names([v.name for v in members])) for g, members in groups.items()]
    title = "What the weights depend on"
    picture = charts.by_layer(named, series, title, said, "variance of the weights", stacked=True)
    numbers = table(
        title,
        ["layer", *(name for _, _, name in parts)],
        [[v.name, *(f"{getattr(v.variance, p):.5f}" for p, _, _ in parts)] for v in ordered],
    )
    drawn = join(
        el("div", picture, cls="wide", tabindex="0", role="group", aria_label=title),
        charts.legend([(style, name) for _, style, name in parts], "box"),
    )
    return figure(title, drawn, said, numbers)


def _classes(report: RoutingReport) -> Html | None:
    """Weights by class of the layers where the class decides most."""
    chosen = most_by_label([v for v in report.layers if v.labels])[:MOST_CLASSES]
    if not chosen or len(report.labels) > 12:
        return None
    rows = []
    for layer in chosen:
        v = layer.variance
        assert v is not None
        said = [f"{name}: " + " ".join(f"{w:.2f}" for w in weights) for name, weights in sorted(layer.labels.items())]
        rows.append(
            [
                layer.name,
                "; ".join(said),
                f"{v.share('label'):.1%}",
                f"{v.share('label_by_chance'):.1%}",
                f"{v.p_value:.3f}",
            ]
        )
    heads = ["layer", "mean weights by class (B0 B1 ...)", "of the variance", "by chance", "p"]
    made = table("Layers whose routing depends most on the class", heads, rows, numbers_from=2)
    words = "p: share of 200 random labellings (and the true one) with at least this part of the class, for each layer "
    words += "alone; of 20 layers, one falls below 0.05 by chance."
    return join(el("h3", "Routing by class"), made, el("p", words))


def _layers(report: RoutingReport) -> Html:
    rows = []
    for v in report.layers:
        if len(v.mean) > 1:
            dead = ", ".join(f"B{e}" for e in v.dead()) or "none"
            rows.append(
                [
                    v.name,
                    f"{v.effective_experts:.2f}",
                    f"{v.entropy:.3f}",
                    f"{v.token_entropy:.3f}",
                    f"{v.specialisation:.4f}",
                    dead,
                ]
            )
    heads = ["layer", "experts used", "entropy of the mean", "mean entropy of a token", "specialisation", "dead"]
    return details(
        "Entropy, specialisation and dead experts by layer",
        table("Entropies in nats; experts used is exp of the first", heads, rows),
    )


def _agreement(report: RoutingReport) -> Html | None:
    rows = [
        [
            a.group,
            *(
                "-" if v is None else f"{v:.3f}"
                for v in (a.sharing, a.others, a.sharing_correlation, a.others_correlation)
            ),
        ]
        for a in report.agreements
    ]
    if not rows:
        return None
    heads = ["group", "share an A", "others", "correlation: share an A", "correlation: others"]
    words = (
        "Agreement: 1 less the total variation distance of two layers' mean weights. Correlation: of their samples' "
    )
    words += "mean weights; layers that react to the samples alike have 1."
    return join(
        el("h3", "Do layers that share an A route alike?"),
        table("Means over pairs of layers of a group", heads, rows),
        el("p", words),
    )


def _history(told: Insight) -> Html | None:
    history, plan = told.history, told.plan
    if history is None or plan is None or not history.steps:
        return None
    figures = []
    for group in plan.groups:
        members = [name for name in group.members if name in history.layers and any(history.tokens[name])]
        if not members or group.num_B == 1:
            continue
        short = dict(zip(group.members, short_names(group.members), strict=True))
        many = len(members) > charts.EXPERT_COLOURS
        series = [
            Series(
                f"layer {short[name]}",
                charts.depth_style(i, len(members)) if many else f"l{i}",
                tuple(zip(map(float, history.steps), history.largest(name), strict=True)),
            )
            for i, name in enumerate(members)
        ]
        said = (
            f"Mean weight of the most used expert at each recorded step; equal weights would be {1 / group.num_B:.2f}."
        )
        title = f"Deciding: {title_of(group)}"
        highest = max(value for s in series for _, value in s.points if value is not None)
        y = (1 / group.num_B, max(highest, 1.2 / group.num_B))
        picture = charts.lines(series, title, said, "optimiser step", "largest mean weight", y=y)
        rows = [[n, *(f"{w:.3f}" for w in history.accumulated(n))] for n in members]
        numbers = table("Mean weights over all recorded steps", ["layer", *(f"B{e}" for e in range(group.num_B))], rows)
        key = (
            charts.depth_key(series[0].name, series[-1].name)
            if many
            else charts.legend([(s.style, s.name) for s in series])
        )
        figures.append(figure(title, join(picture, key), said, numbers))
    return join(el("h3", "While it learned"), el("div", *figures, cls="grid")) if figures else None
