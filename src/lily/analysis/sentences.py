"""Descriptions of the figures: alternative texts, captions and the summary in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from math import log
from statistics import median

from lily.analysis.rank import RankReport
from lily.analysis.routing import LayerRouting, RoutingReport
from lily.plan.sharing_plan import Group, SharingPlan


def short_names(names: Sequence[str]) -> list[str]:
    """The numbers that distinguish layers, such as `0` or `1.2`; their positions if these are not unique."""
    parts = [name.split(".") for name in names]
    common = takewhile(lambda column: len(set(column)) == 1 < len(names), zip(*parts, strict=False))
    start = len(list(common))
    numbers = [".".join(p for p in part[start:] if p.isdigit()) for part in parts]
    return numbers if all(numbers) and len(set(numbers)) == len(numbers) else [str(i) for i in range(len(names))]


def title_of(group: Group) -> str:
    """A group's name with its shape, as in reports."""
    return f"{group.name} ({group.out_features}, {group.in_features})"


def sharing_words(group: Group) -> str:
    """Describe the sharing in a group."""
    sizes = [len(block) for block in group.blocks]
    each = f"{sizes[0]}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
    matrices = "one A" if len(sizes) == 1 else f"{len(sizes)} A, each by {each} consecutive layers"
    experts = "one B" if group.num_B == 1 else f"{group.num_B} experts B, which every layer mixes"
    return f"{len(group.members)} layers share {matrices}, and {experts}. Rank {group.r}."


def plan_words(plan: SharingPlan) -> str:
    """Describe the sharing of an adapter in one sentence."""
    experts = sum(g.num_B for g in plan.groups)
    return (
        f"{plan.num_layers} layers in {len(plan.groups)} groups share {len(plan.blocks)} A and {experts} B; "
        f"LoRA, with one pair per layer, would have {plan.num_layers} of each."
    )


def rank_words(report: RankReport, lora: RankReport | None = None, equal_lora: int | None = None) -> str:
    """Describe the ranks, compared with LoRA's."""
    text = (
        f"The median layer's update has numerical rank {report.median():g} of at most "
        f"{max(layer.expected.limit for layer in report.layers)} (singular values above {report.threshold:g} of the "
        f"largest), effective rank {report.median('effective_rank'):.1f} and stable rank "
        f"{report.median('stable_rank'):.1f}."
    )
    if any(layer.union is not None for layer in report.layers) and not report.assumed:
        varying = sum(layer.varying for layer in report.layers) / len(report.layers)
        text += (
            f" The updates of all tokens together span {report.median(union=True):g} output directions, and "
            f"{varying:.1%} of an update's squared norm depends on the data."
        )
    if lora is not None:
        text += (
            f" The LoRA trained for comparison has numerical rank {lora.median():g}, effective rank "
            f"{lora.median('effective_rank'):.1f} and stable rank {lora.median('stable_rank'):.1f}."
        )
    elif equal_lora is not None:
        text += f" LoRA with as many parameters has rank {equal_lora}."
    return text


def short_rank_words(report: RankReport, lora: RankReport | None, equal_lora: int | None) -> str:
    """The numerical ranks in one sentence."""
    text = f"The median layer's update has numerical rank {report.median():g}"
    if lora is not None:
        return f"{text}; the LoRA trained for comparison has {lora.median():g}."
    return f"{text}; LoRA with as many parameters has at most {equal_lora}." if equal_lora is not None else f"{text}."


def overlap_words(report: RankReport) -> str:
    """Describe the overlap of the layers' subspaces."""

    def mean(what: str, sharing: bool) -> str:
        values = [m for overlap in report.overlaps if (m := overlap.mean(what, sharing)) is not None]
        return f"{sum(values) / len(values):.2f}" if values else "-"

    return (
        f"Mean overlap of input directions: {mean('rows', True)} between layers that share an A, {mean('rows', False)} "
        f"between other layers of a group. Of output directions: {mean('columns', True)} and {mean('columns', False)}. "
        "1: identical; 0: orthogonal."
    )


def routing_words(report: RoutingReport) -> str:
    """Describe the routing."""
    routed = [layer for layer in report.layers if len(layer.mean) > 1]
    if not routed:
        return "There is one B in each group, so nothing is routed."
    if report.routing == "uniform":
        return "All experts have equal weight everywhere (uniform routing)."
    counts = [len(layer.mean) for layer in routed]  # groups may differ
    spread = f"{median(layer.effective_experts for layer in routed):.2f} of {_from_to(counts, '{}')}"
    text = f"The median layer uses {spread} experts (exp of the entropy of its mean weights)."
    if not any(layer.tokens for layer in routed):
        return f"{text} The weights are constant: they do not depend on the data."
    text += (
        f" The mutual information of expert and token is {median(layer.specialisation for layer in routed):.3f} nats "
        f"(median; {_from_to([log(count) for count in counts], '{:.3f}')} at most)."
    )
    tested = [layer for layer in routed if layer.variance is not None and layer.variance.p_value is not None]
    if tested:
        by = most_by_label(tested)
        share = by[0].variance.share("label") if by and by[0].variance is not None else 0.0
        text += f" In {len(by)} of {len(tested)} layers weights depend on the class beyond chance (p < 0.05 each)" + (
            f"; most in {by[0].name}, where it explains {share:.0%} of their variance." if by else "."
        )
    if report.dead:
        dead = ", ".join(f"B{e} of {group}" for group, experts in report.dead.items() for e in experts)
        text += f" Experts that are dead in all layers: {dead}."
    return text


def most_by_label(layers: Sequence[LayerRouting], level: float = 0.05) -> list[LayerRouting]:
    """Layers whose weights depend on the label beyond chance, by the decreasing share of variance it explains."""
    tested = [(r, v) for r in layers if (v := r.variance) is not None and v.p_value is not None and v.p_value < level]
    return [r for r, v in sorted(tested, key=lambda pair: -pair[1].share("label"))]


def _from_to(values: Sequence[float], form: str) -> str:
    """`2`, or `2 to 4` where they differ."""
    return " to ".join(form.format(value) for value in sorted({min(values), max(values)}))
