"""What the adapter is: sharing, sizes, collapse and origin; empty where an `Insight` has no data for a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from lily.analysis.factored import grouped
from lily.analysis.rank import LayerRank
from lily.analysis.routing import LayerRouting
from lily.analysis.sentences import plan_words, sharing_words, short_names, title_of
from lily.analysis.series import block_sizes
from lily.html import charts
from lily.html.page import Block, Details, Figure, Legend, Multiples, Panel, Table, Terms
from lily.insight.gather import Insight
from lily.recipes.scoring.metrics import shown

T = TypeVar("T", LayerRank, LayerRouting)


def number(value: float | None, form: str = ".3f") -> str:
    """For a table; a dash for None."""
    return "-" if value is None else format(value, form)


def by_columns(layers: Sequence[T]) -> tuple[list[tuple[str, list[str]]], list[T]]:
    """Layers in groups: (label of the group, short names of its layers), and the layers in this order.

    A label contains the shape only where two groups have the same name.
    """
    groups = grouped(layers)
    bare = [group.partition(" (")[0] for group in groups]
    labels = [name if bare.count(name) == 1 else group for name, group in zip(bare, groups, strict=True)]
    names = [short_names([layer.name for layer in members]) for members in groups.values()]
    return list(zip(labels, names, strict=True)), [layer for members in groups.values() for layer in members]


def layer_figure(
    columns: tuple[list[tuple[str, list[str]]], Sequence[LayerRank | LayerRouting]],
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    title: str,
    words: str,
    caption: str,
    y_label: str,
    form: str,
    shape: str = "dot",
) -> Figure:
    """A figure with one column per layer, from `by_columns`, and its numbers; bars are stacked if `shape` is `box`."""
    groups, layers = columns
    cells = zip(*(values for _, _, values in series), strict=True)
    rows = [[layer.name, *(number(v, form) for v in row)] for layer, row in zip(layers, cells, strict=True)]
    chart = charts.by_layer(groups, series, title, words, y_label, stacked=shape == "box")
    table = Table(title, ["layer", *(name for name, _, _ in series)], rows)
    return Figure(title, chart, caption, table, Legend([(style, name) for name, style, _ in series], shape), wide=True)


def sharing(insight: Insight) -> list[Block]:
    """Group by group: which layers share which A, and how each mixes the experts."""
    plan = insight.plan
    if plan is None:
        return []
    routing = grouped(insight.routing.layers) if insight.routing is not None else {}
    panels, tables = [], []
    for group in plan.groups:
        title, words = title_of(group), sharing_words(group)
        routed = routing.get(title)
        weights = [layer.mean for layer in routed] if routed else None
        names = short_names(group.members)
        chart = charts.sharing(title, names, block_sizes(plan, group), weights, group.num_B, words, charts.SMALL)
        panels.append(Panel(title, chart, words))
        if weights is not None:
            means = zip(group.members, weights, strict=True)
            rows = [[name, f"A{plan.slots[name].A}", *map(number, mean)] for name, mean in means]
            heads = ["layer", "A", *(f"B{e}" for e in range(group.num_B))]
            tables.append(Table(f"Mean expert weights in {title}", heads, rows))
    bands = "no data were read, so the bands are of equal height"
    if routing:
        bands = "mean weight of each expert" + (f" over {insight.read}" if insight.read else "")
    caption = (
        "Boxes: the layers that share one A, and so read the same input directions. Bands: how each layer mixes the "
        f"experts B that its whole group shares; {bands}."
    )
    experts = range(max(g.num_B for g in plan.groups))
    legend = Legend([(f"e{e % charts.EXPERT_COLORS}", f"expert B{e}") for e in experts], "box")
    return [plan_words(plan), Multiples("Who shares what, by group of layers", panels, caption, tables, legend)]


def sizes(insight: Insight) -> list[Block]:
    """Parameters by part."""
    if insight.plan is not None:
        p = insight.plan.parameters
        groups = insight.plan.groups
        counts = {
            "A, shared by neighbors": p.A,
            "B, shared by all": p.B,
            "routers, one per layer": p.router,
            **({"gains, and A and B of each layer's own": p.own} if p.own else {}),
            "adapter": p.total,
            "LoRA of the same rank": sum(
                len(g.members) * g.r * (g.conv_groups * g.in_features + g.reach) for g in groups
            ),
        }
    else:
        counts = {name: t["parameters"] for name, t in insight.facts.get("tensors", {}).items()}
    rows = [[name, f"{count:,}"] for name, count in counts.items()]
    if insight.run is not None and insight.run.parameters.get("head"):
        rows.append(["new head", f"{insight.run.parameters['head']:,.0f}"])
    return [Table("Parameters", ["part", "parameters"], rows)] if rows else []


def collapse(insight: Insight) -> list[Block]:
    """The drift of an adapter that was made static."""
    report = insight.facts.get("collapse") or insight.facts.get("provenance", {}).get("collapse")
    if not report:
        return []
    drift, after = report["drift"], report["metrics"].get("after", {})
    rows = [
        ["KL divergence of an output (nats)", number(drift["kl"], ".4g")],
        ["relative error of the outputs", f"{drift['relative_error']:.4g}"],
        ["outputs compared", f"{drift['positions']:,}"],
    ]
    before = report["metrics"].get("before", {})
    rows += [[f"{n} before, after", f"{shown(n, value)}, {shown(n, after[n])}"] for n, value in before.items()]
    layers = [
        [v["name"], f"{v['uniformity']:.3f}", f"{v['variance']:.4f}", number(v["update_error"], ".1%")]
        for v in report["layers"]
    ]
    heads = ["layer", "distance from equal weights", "variance over tokens", "relative error of the update"]
    return [
        f"{report['routing']} routing became static over {report['tokens']:,} tokens of calibration data.",
        Table("Drift on held-out data", ["measure", "value"], rows),
        Details("By layer", Table("Routing over the calibration data, and what collapsing it changed", heads, layers)),
    ]


def about(insight: Insight) -> list[Block]:
    """Configuration and origin, copied from the files."""
    facts = dict(insight.facts.get("config", {}))
    origin = insight.facts.get("provenance", {})
    facts |= {f"from: {k}": v for k, v in origin.items() if k not in ("collapse", "plan", "energies")}
    return [Terms([(name, str(value)) for name, value in facts.items()])] if facts else []
