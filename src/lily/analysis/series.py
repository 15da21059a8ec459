"""The numbers behind figures drawn twice: with matplotlib in `lily.analysis.plots`, as SVG in `lily.insight`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lily.analysis.rank import RankReport, Spectrum
from lily.analysis.routing import LayerRouting
from lily.plan.sharing_plan import Group, SharingPlan


def ranks_by_layer(
    report: RankReport, lora: RankReport | None = None, what: str = "numerical_rank"
) -> Mapping[str, list[float | None]]:
    """Ranks (`numerical_rank` or `effective_rank`) of every layer of `report`, in its order.

    `expected`, `union` where the weights were measured, and `lora` where there is one, each with one value per layer of
    `report`, None where a layer has none.
    """

    def rank(spectrum: Spectrum | None) -> float | None:
        if spectrum is None:
            return None
        return float(spectrum.numerical_rank(report.threshold) if what == "numerical_rank" else spectrum.effective_rank)

    out = {"expected": [rank(layer.expected) for layer in report.layers]}
    if any(layer.union is not None for layer in report.layers) and not report.assumed:
        out["union"] = [rank(layer.union) for layer in report.layers]
    if lora is not None:
        by_name = {layer.name: rank(layer.expected) for layer in lora.layers}
        out["lora"] = [by_name.get(layer.name) for layer in report.layers]
    return out


def relative_spectra(report: RankReport) -> list[list[float]]:
    """Singular values of each layer's expected update as shares of its largest; layers without an update left out."""
    spectra = (layer.expected.values for layer in report.layers)
    return [[v / values[0] for v in values] for values in spectra if values and values[0] > 0]


def by_expert(layers: Sequence[LayerRouting]) -> list[list[float]]:
    """Mean weights (experts, layers) of one group."""
    return [list(weights) for weights in zip(*(layer.mean for layer in layers), strict=True)]


def block_sizes(plan: SharingPlan, group: Group) -> list[tuple[int, int]]:
    """(number of the A, number of layers that share it) of a group, in order."""
    return [(plan.slots[block[0]].A, len(block)) for block in group.blocks]
