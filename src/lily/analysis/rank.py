"""Rank of a layer's update, and overlap of the layers' subspaces.

For a layer with experts B_e (r, out), weights w_t of token t and second moment S = E[w w^T] over tokens:

    update of a token     D_t = scaling * (sum_e w_te B_e)^T A                     (out, in), rank <= r
    expected update       E[D_t], the update at the mean weights                   rank <= r
    union over tokens     [D_1 | D_2 | ... | D_T] / sqrt(T), updates side by side   rank <= min(out, rank(S) * r)

The union's singular values are the roots of the eigenvalues of E[D_t D_t^T]: the output directions that the tokens use
together, weighted by their use. They depend on the routing only through S, which `lily.analysis.routing` measures. For
updates on top of each other the rank is that of A: all tokens of a layer, and all layers that share its A, read the
same r directions of the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lily.analysis.factored import Factored, Mixing, grouped
from lily.errors import LilyError

# Smallest ratio to the largest singular value at which a direction counts.
THRESHOLD = 0.01


@dataclass(frozen=True)
class Spectrum:
    """Singular values of an update and measures derived from them.

    Attributes:
        values: singular values in decreasing order; as many as can be nonzero by the factors.
        limit: the largest rank that the factors allow.
    """

    values: tuple[float, ...]
    limit: int

    def numerical_rank(self, threshold: float = THRESHOLD) -> int:
        """Singular values greater than `threshold` times the largest; 0 for an update of zero."""
        top = self.values[0] if self.values else 0.0
        return sum(v > threshold * top for v in self.values)

    @property
    def effective_rank(self) -> float:
        """Exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007); 0 for zero."""
        s = torch.tensor(self.values, dtype=torch.float64)
        if not s.sum():
            return 0.0
        return float(torch.special.entr(s / s.sum()).sum().exp())

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared spectral norm; 0 for zero."""
        return self.energy_total / self.values[0] ** 2 if self.values and self.values[0] else 0.0

    @property
    def energy_total(self) -> float:
        """Squared Frobenius norm."""
        return sum(v * v for v in self.values)

    @property
    def energy(self) -> tuple[float, ...]:
        """Share of the squared norm in the first k directions, for k = 1, 2, ..."""
        total = self.energy_total
        squares = torch.tensor(self.values, dtype=torch.float64).square().cumsum(0)
        return tuple((squares / total).tolist()) if total else tuple(0.0 for _ in self.values)

    def to_dict(self, threshold: float = THRESHOLD) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "values": list(self.values),
            "limit": self.limit,
            "numerical_rank": self.numerical_rank(threshold),
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "energy": list(self.energy),
        }


@dataclass(frozen=True)
class LayerRank:
    """One layer's update.

    Attributes:
        name: name of the layer.
        group: name and shape of its group.
        shared: index of its A.
        shape: (out, in).
        r: rank of its factors.
        expected: spectrum of the update at the mean weights.
        union: spectrum of all tokens' updates together; None if the weights are constant, since it is then the same.
        varying: share of the mean squared norm of a token's update that is not the expected update; 0 if constant.
        mixing: source of the weights: see `Mixing`.
    """

    name: str
    group: str
    shared: int
    shape: tuple[int, int]
    r: int
    expected: Spectrum
    union: Spectrum | None
    varying: float
    mixing: str

    def to_dict(self, threshold: float) -> dict[str, Any]:
        """Plain values for JSON."""
        facts = {k: getattr(self, k) for k in ("name", "group", "shared", "shape", "r", "varying", "mixing")}
        spectra = {"expected": self.expected.to_dict(threshold)}
        if self.union is not None:
            spectra["union"] = self.union.to_dict(threshold)
        return {**facts, "shape": list(self.shape), **spectra}


@dataclass(frozen=True)
class Overlap:
    """Overlap of the subspaces of one group's layers.

    The overlap of two subspaces of dimensions k and l is the mean squared cosine of their min(k, l) principal angles:
    1 if one contains the other, 0 if they are orthogonal.

    Attributes:
        group: the group.
        layers: names, in order.
        columns: overlaps of the column spaces (output directions), (layers, layers).
        rows: overlaps of the row spaces (input directions), (layers, layers).
        columns_by_chance: mean overlap of random subspaces of these dimensions: max(k, l) / out.
        rows_by_chance: the same for rows: max(k, l) / in.
        shared: index of each layer's A.
    """

    group: str
    layers: tuple[str, ...]
    columns: tuple[tuple[float, ...], ...]
    rows: tuple[tuple[float, ...], ...]
    columns_by_chance: float
    rows_by_chance: float
    shared: tuple[int, ...]

    def mean(self, what: str, sharing: bool) -> float | None:
        """Mean over the pairs that share their A, or over those that do not; None if there are none.

        Args:
            what: `columns` or `rows`.
            sharing: select pairs that share their A, or the others.
        """
        table = getattr(self, what)
        pairs = combinations(range(len(self.layers)), 2)
        chosen = [table[i][j] for i, j in pairs if (self.shared[i] == self.shared[j]) == sharing]
        return sum(chosen) / len(chosen) if chosen else None


@dataclass(frozen=True)
class RankReport:
    """Rank and overlap of an adapter.

    Attributes:
        threshold: threshold of the numerical rank and of the subspaces.
        layers: one entry per layer.
        overlaps: one entry per group of several layers.
    """

    threshold: float
    layers: tuple[LayerRank, ...]
    overlaps: tuple[Overlap, ...]

    @property
    def assumed(self) -> bool:
        """Whether the weights of a data-dependent routing were assumed, not measured."""
        return any(layer.mixing == "equal" for layer in self.layers)

    def median(self, what: str = "numerical_rank", union: bool = False) -> float:
        """Median over layers of `numerical_rank`, `effective_rank` or `stable_rank`."""
        spectra = [(layer.union if union else None) or layer.expected for layer in self.layers]
        values = [s.numerical_rank(self.threshold) if what == "numerical_rank" else getattr(s, what) for s in spectra]
        return float(torch.tensor(list(map(float, values))).quantile(0.5))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "threshold": self.threshold,
            "layers": [layer.to_dict(self.threshold) for layer in self.layers],
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
        }


def rank_report(
    layers: Sequence[Factored], mixings: Mapping[str, Mixing] | None = None, threshold: float = THRESHOLD
) -> RankReport:
    """Singular values, ranks and overlaps of an adapter's updates, from its factors.

    Args:
        layers: from `lily.analysis.factored.lily_layers` or `lora_layers`.
        mixings: layer -> its measured expert weights, if they depend on the data; see `RoutingReport.mixings`.
            Default: see `Mixing.assumed`.
        threshold: smallest ratio to the largest singular value at which a direction counts.

    Returns:
        The report, in the layers' order.

    Raises:
        LilyError: if the threshold is not between 0 and 1, a mixing has another number of experts, or a value of a
            layer is not finite.
    """
    if not 0 < threshold < 1:
        raise LilyError(f"threshold={threshold:g} is not a ratio of singular values; give a number between 0 and 1")
    measured = mixings or {}
    chosen = {layer.name: layer.static or measured.get(layer.name) or Mixing.assumed(layer.experts) for layer in layers}
    for layer in layers:
        if (experts := chosen[layer.name].mean.numel()) != layer.experts:
            raise LilyError(f"{layer.name} mixes {layer.experts} experts, but its statistics have {experts}")
        _check_finite(layer, chosen[layer.name])
    ranks = tuple(_layer_rank(layer, chosen[layer.name]) for layer in layers)
    several = {group: members for group, members in grouped(layers).items() if len(members) > 1}
    return RankReport(threshold, ranks, tuple(_overlap(*group, chosen, threshold) for group in several.items()))


def _check_finite(layer: Factored, mixing: Mixing) -> None:
    """Refuse values that are not finite; the error of the linear algebra library would not name the layer."""
    # a QR decomposition keeps values that are not finite in its triangular factor
    parts = (("A", layer.in_core), ("B", layer.out_core), ("its weights", mixing.mean), ("its weights", mixing.second))
    bad = dict.fromkeys(name for name, tensor in parts if not torch.isfinite(tensor).all())
    if bad:
        raise LilyError(
            f"{layer.name}: numbers in {' and '.join(bad)} are NaN or infinite, so its update has no rank; the "
            "training diverged or the file is damaged: use an earlier checkpoint, or train at a lower learning rate"
        )


def _layer_rank(layer: Factored, mixing: Mixing) -> LayerRank:
    limit = min(layer.r, *layer.shape)
    expected = Spectrum(_singular_values(layer.core(mixing.mean), limit), limit)
    union, varying = None, 0.0
    if layer.static is None:
        widest = min(layer.shape[0], layer.experts * limit)
        union = Spectrum(_singular_values(layer.union_core(mixing.second), widest), widest)
        varying = 1 - expected.energy_total / union.energy_total if union.energy_total else 0.0
    return LayerRank(
        layer.name, layer.group, layer.shared, layer.shape, layer.r, expected, union, max(0.0, varying), mixing.source
    )


def _singular_values(core: Tensor, most: int) -> tuple[float, ...]:
    return tuple(torch.linalg.svdvals(core)[:most].tolist())


def _overlap(group: str, members: Sequence[Factored], mixings: Mapping[str, Mixing], threshold: float) -> Overlap:
    spaces = [_subspaces(layer, mixings[layer.name].mean, threshold) for layer in members]
    columns, rows = (tuple(tuple(_common(x[i], y[i]) for y in spaces) for x in spaces) for i in range(2))
    out, into = members[0].shape
    pairs = [max(a, b) for a, b in combinations((space[0].shape[1] for space in spaces), 2)]
    chance = sum(pairs) / len(pairs)
    names, shared = tuple(m.name for m in members), tuple(m.shared for m in members)
    return Overlap(group, names, columns, rows, chance / out, chance / into, shared)


def _subspaces(layer: Factored, mean: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Orthonormal bases (out, k) and (in, k) of the directions above the threshold in the expected update."""
    u, s, v = torch.linalg.svd(layer.core(mean), full_matrices=False)
    kept = s > threshold * s.max() if s.numel() else s > 0
    return layer.out_basis @ u[:, kept], layer.in_basis @ v[kept].T


def _common(x: Tensor, y: Tensor) -> float:
    """Mean squared cosine of the principal angles between the spans of two orthonormal bases."""
    least = min(x.shape[1], y.shape[1])
    return min(1.0, float((x.T @ y).square().sum()) / least) if least else 0.0
