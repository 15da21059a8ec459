"""Routing over data: how much each expert is used, and what that depends on.

For tokens t with weights w_t (a distribution over E experts), of samples s(t) with labels c(t), and m the mean over all
tokens, m_s over a sample's, m_c over a label's, the variance of the weights is an exact sum (law of total variance):

    E|w_t - m|^2  =  E|w_t - m_s|^2  +  E|m_s - m_c|^2  +  E|m_c - m|^2
       total             token              sample            label

so their shares measure how much the weights depend on the token within a sample, on the sample within its label, and on
the label. Means are over tokens, so long samples count more; padding does not count.

The entropy of the mean weights, minus the mean entropy of a token's weights, is the mutual information of token and
expert: 0 if every token mixes the experts equally, ln E if each token uses one expert and all are used equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from lily.analysis.factored import Mixing, grouped, static_mixing
from lily.analysis.recorder import Recorder
from lily.errors import LilyError
from lily.layers.routing_statistics import DEAD_EXPERT
from lily.tuner.adapter import Adapted, find
from lily.tuner.recording import Batch, call, evaluating

# Number of permutations in the test of the label's share.
PERMUTATIONS = 200


@dataclass(frozen=True)
class Variance:
    """The variance of a layer's weights over tokens, summed over experts, and its parts; see the module.

    Attributes:
        total: total variance.
        token: variance between tokens of one sample.
        sample: variance between samples (of one label, if there are labels).
        label: variance between labels; None if there are none, or all are the same.
        label_by_chance: mean of `label` over random permutations of the labels.
        p_value: share of permutations (including the true labels) with at least this `label`.
    """

    total: float
    token: float
    sample: float
    label: float | None = None
    label_by_chance: float | None = None
    p_value: float | None = None

    def share(self, part: str) -> float:
        """A part (`token`, `sample`, `label`, `label_by_chance`) as a share of the total; 0 if that is 0."""
        value = getattr(self, part)
        return value / self.total if self.total and value is not None else 0.0


@dataclass(frozen=True)
class LayerRouting:
    """One layer's routing.

    Attributes:
        name: name of the layer.
        group: name and shape of its group.
        shared: index of its A.
        tokens: number of counted tokens; 0 if the weights are constant, so that no data were read.
        mean: mean weights, (E,).
        second: mean of w w^T, (E, E).
        token_entropy: mean entropy of a token's weights, in nats.
        variance: what the weights depend on; None if samples could not be separated.
        labels: label -> mean weights over its tokens.
    """

    name: str
    group: str
    shared: int
    tokens: int
    mean: tuple[float, ...]
    second: tuple[tuple[float, ...], ...]
    token_entropy: float
    variance: Variance | None
    labels: dict[str, tuple[float, ...]]

    @property
    def entropy(self) -> float:
        """Entropy of the mean weights in nats: ln E if all experts are used equally."""
        return float(torch.special.entr(torch.tensor(self.mean, dtype=torch.float64)).sum())

    @property
    def specialisation(self) -> float:
        """Mutual information of token and expert, in nats: see the module."""
        return max(0.0, self.entropy - self.token_entropy)

    @property
    def effective_experts(self) -> float:
        """Exp of the entropy of the mean weights."""
        return exp(self.entropy)

    def dead(self, threshold: float = DEAD_EXPERT) -> tuple[int, ...]:
        """Experts with a mean weight below `threshold` times an equal one."""
        return tuple(e for e, w in enumerate(self.mean) if w < threshold / len(self.mean))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        derived = ("entropy", "specialisation", "effective_experts")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}, "dead": list(self.dead())}


@dataclass(frozen=True)
class Agreement:
    """Similarity of the routing of one group's layers, as means over pairs of layers.

    The agreement of two layers is 1 minus the total variation distance of their mean weights: 1 if these are equal, 0
    if the layers use different experts. Their correlation is that of the samples' mean weights, centered per layer,
    over samples and experts: 1 if both react equally to the samples.

    Attributes:
        group: the group.
        sharing: agreement of pairs that share their A; None if there are none.
        others: agreement of the other pairs.
        sharing_correlation: correlation of pairs that share their A; None if nothing varies.
        others_correlation: correlation of the other pairs.
    """

    group: str
    sharing: float | None
    others: float | None
    sharing_correlation: float | None = None
    others_correlation: float | None = None


@dataclass(frozen=True)
class RoutingReport:
    """Routing of an adapter.

    Attributes:
        routing: `token`, `sequence`, `batch`, `static` or `uniform`.
        samples: number of samples.
        labels: labels in the order of their first sample; empty: there are none.
        layers: one entry per layer, in the plan's order.
        agreements: one entry per group of several routed layers.
    """

    routing: str
    samples: int
    labels: tuple[str, ...]
    layers: tuple[LayerRouting, ...]
    agreements: tuple[Agreement, ...]

    @property
    def compares_labels(self) -> bool:
        """Whether there is more than one label."""
        return len(self.labels) > 1

    @property
    def mixings(self) -> dict[str, Mixing]:
        """Measured weights of the layers that depend on the data, for `lily.analysis.rank.rank_report`."""
        return {
            layer.name: Mixing(torch.tensor(layer.mean).double(), torch.tensor(layer.second).double(), "data")
            for layer in self.layers
            if layer.tokens
        }

    @property
    def dead(self) -> dict[str, tuple[int, ...]]:
        """Group -> experts that are dead in all its layers."""
        out: dict[str, set[int]] = {}
        for layer in self.layers:
            dead = set(layer.dead())
            out[layer.group] = out.get(layer.group, dead) & dead
        return {group: tuple(sorted(experts)) for group, experts in out.items() if experts}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "routing": self.routing,
            "samples": self.samples,
            "labels": list(self.labels),
            "layers": [layer.to_dict() for layer in self.layers],
            "agreements": [asdict(agreement) for agreement in self.agreements],
        }


def routing_report(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    labels: Sequence[object] | None = None,
    *,
    adapter: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> RoutingReport:
    """Record the routing of every layer over data in one pass; for a static adapter, its constant weights.

    Args:
        model: the model with the adapter; its mode (train or eval) is restored.
        batches: arguments of `model(**batch)`, `model(*batch)` or `model(batch)`. Not read if the weights are constant.
        labels: labels of all samples, in the batches' order.
        adapter: name of the adapter; default: the active one.
        forward: runs a batch through the model, for other kinds of batches.

    Raises:
        LilyError: if there is no such adapter or no batch, the adapter is settling, or the number of labels is not
            that of the samples.
    """
    adapted = find(model, adapter)
    fixed = {name: static_mixing(layer, adapted) for name, layer in adapted.layers.items()}
    routed = [name for name, mixing in fixed.items() if mixing is None]
    recorders = {name: Recorder(adapted.layers[name].settings[adapted.name].num_B) for name in routed}
    samples = 0
    if recorders:
        if adapted.config.settled is not None:
            raise LilyError(
                f"adapter {adapted.name!r} was saved while settling (settled={adapted.config.settled:g}); finish that "
                "training, or analyze an earlier checkpoint"
            )
        samples = _record(model, adapted, recorders, batches, forward or call)
        if labels is not None and len(labels) != samples:
            raise LilyError(f"{len(labels)} labels for {samples} samples; give one label per sample")
    given = [str(label) for label in labels or ()] if recorders else []
    names = tuple(dict.fromkeys(given))
    ids = torch.tensor([names.index(label) for label in given]) if names else None
    layers, sampled = [], {}
    for name, mixing in fixed.items():
        group = adapted.plan.group_of(name)
        where = (name, f"{group.name} ({group.out_features}, {group.in_features})", adapted.plan.slots[name].A)
        if mixing is not None:
            plain, entropy = _plain(mixing.mean, mixing.second), float(torch.special.entr(mixing.mean).sum())
            layers.append(LayerRouting(*where, 0, *plain, entropy, Variance(0.0, 0.0, 0.0), {}))
            continue
        layers.append(_recorded(where, recorders[name], names, ids))
        if recorders[name].aligned:
            means = recorders[name].by_sample / recorders[name].tokens.clamp(min=1).unsqueeze(-1)
            sampled[name] = (means - means.mean(0)).flatten()
    return RoutingReport(str(adapted.config.routing), samples, names, tuple(layers), _agreements(layers, sampled))


@torch.no_grad()
def _record(
    model: nn.Module,
    adapted: Adapted,
    recorders: Mapping[str, Recorder],
    batches: Iterable[Batch],
    run: Callable[[nn.Module, Any], Any],
) -> int:
    samples = 0
    with evaluating(model, adapted):
        for name, recorder in recorders.items():
            adapted.layers[name].statistics[adapted.name] = recorder
        adapted.watch_masks()
        for batch in batches:
            size = _samples(batch)
            for recorder in recorders.values():
                recorder.begin(size)
            run(model, batch)
            samples += size
    if not samples:
        raise LilyError("the routing depends on the data, but there is no batch; give at least one")
    if not any(recorder.count.item() for recorder in recorders.values()):
        raise LilyError("no adapted layer ran on these batches; is the adapter active and enabled?")
    return samples


def _samples(batch: Batch) -> int:
    tensors = batch.values() if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
    first = next((t for t in tensors if isinstance(t, Tensor) and t.ndim), None)
    return 0 if first is None else int(first.shape[0])


Where = tuple[str, str, int]


def _plain(mean: Tensor, second: Tensor) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    return tuple(mean.tolist()), tuple(tuple(row) for row in second.tolist())


def _recorded(where: Where, recorder: Recorder, names: Sequence[str], ids: Tensor | None) -> LayerRouting:
    count = max(recorder.count.item(), 1.0)
    mean, second = recorder.mean.cpu(), recorder.second / count
    variance, labels = None, {}
    if recorder.aligned:
        total = float(second.diagonal().sum() - mean.square().sum())
        variance = decompose(max(0.0, total), recorder.by_sample, recorder.tokens, ids)
        if ids is not None:
            for i, name in enumerate(names):
                sums, tokens = recorder.by_sample[ids == i].sum(0), recorder.tokens[ids == i].sum()
                labels[name] = tuple((sums / tokens.clamp(min=1)).tolist())
    plain = _plain(mean, second)
    return LayerRouting(*where, int(recorder.count.item()), *plain, recorder.entropy / count, variance, labels)


def decompose(total: float, sums: Tensor, tokens: Tensor, ids: Tensor | None = None) -> Variance:
    """The law of total variance; see the module.

    Args:
        total: variance over tokens, summed over experts.
        sums: sum of the weights over each sample's tokens, (samples, E).
        tokens: number of tokens of each sample, (samples,).
        ids: index of each sample's label, (samples,); None: no labels.
    """
    between = _between(sums, tokens)
    token = max(0.0, total - between)
    if ids is None or bool((ids == ids[0]).all()):
        return Variance(total, token, between)
    one_hot = torch.nn.functional.one_hot(ids).double()
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(len(ids)), *(torch.randperm(len(ids), generator=generator) for _ in range(PERMUTATIONS))]
    label, *permuted = (_between(y.T @ sums, y.T @ tokens) for y in (one_hot[order] for order in orders))
    beyond = sum(value >= label for value in permuted)
    chance = sum(permuted) / PERMUTATIONS
    return Variance(total, token, max(0.0, between - label), label, chance, (1 + beyond) / (1 + PERMUTATIONS))


def _between(sums: Tensor, tokens: Tensor) -> float:
    """Variance of the rows' means, weighted by tokens and summed over experts."""
    kept = tokens > 0
    sums, tokens = sums[kept], tokens[kept]
    if not len(tokens):
        return 0.0
    means = sums / tokens.unsqueeze(-1)
    share = tokens / tokens.sum()
    return float((share * (means - share @ means).square().sum(-1)).sum())


def _agreements(layers: Sequence[LayerRouting], sampled: Mapping[str, Tensor]) -> tuple[Agreement, ...]:
    groups = grouped(layer for layer in layers if len(layer.mean) > 1)
    return tuple(_agreement(group, members, sampled) for group, members in groups.items() if len(members) > 1)


def _agreement(group: str, members: Sequence[LayerRouting], sampled: Mapping[str, Tensor]) -> Agreement:
    values: dict[bool, list[float]] = {True: [], False: []}
    correlations: dict[bool, list[float]] = {True: [], False: []}
    for x, y in combinations(members, 2):
        sharing = x.shared == y.shared
        values[sharing].append(1 - sum(abs(a - b) for a, b in zip(x.mean, y.mean, strict=True)) / 2)
        if x.name in sampled and y.name in sampled:
            a, b = sampled[x.name], sampled[y.name]
            norm = float(a.norm() * b.norm()) if a.shape == b.shape else 0.0
            if norm:
                correlations[sharing].append(float(a @ b) / norm)
    means = [_mean(values[True]), _mean(values[False]), _mean(correlations[True]), _mean(correlations[False])]
    return Agreement(group, *means)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
