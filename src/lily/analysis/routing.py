"""What the routers do over data: how much each expert is used, and what that depends on.

For tokens t with weights w_t (a distribution over E experts), of samples s(t) with labels c(t), and m the mean over all
tokens, m_s over a sample's, m_c over a label's, the variance of the weights is an exact sum (law of total variance):

    E|w_t - m|^2  =  E|w_t - m_s|^2  +  E|m_s - m_c|^2  +  E|m_c - m|^2
       total             token              sample            label

so their shares say how much the weights depend on the token inside a sample, on the sample inside its label, and on the
label. Means are over tokens: a long sample counts more. Padding does not count.

The entropy of the mean weights, less the mean entropy of a token's own, is the mutual information of token and expert:
0 if every token mixes the experts alike, ln E if each token uses one expert and all experts are used alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from lily.analysis.factored import Mixing, static_mixing
from lily.analysis.recorder import Recorder
from lily.errors import LilyError
from lily.layers.routing_statistics import DEAD_EXPERT
from lily.tuner.adapter import Adapted, find
from lily.tuner.recording import Batch, call, evaluating

# Random labellings by which the label's share is judged.
PERMUTATIONS = 200


@dataclass(frozen=True)
class Variance:
    """The variance of a layer's weights over tokens, summed over experts, and its parts; see the module.

    Attributes:
        total: all of it.
        token: between tokens of one sample.
        sample: between samples (of one label, where labels are known).
        label: between labels; None where they are not known, or all the same.
        label_by_chance: what the part of the label is on average when labels are dealt out at random.
        p_value: share of random labellings (and the true one) with at least this part of the label.
    """

    total: float
    token: float
    sample: float
    label: float | None = None
    label_by_chance: float | None = None
    p_value: float | None = None

    def share(self, part: str) -> float:
        """A part (`token`, `sample`, `label`, `label_by_chance`) as a share of the whole; 0 where nothing varies."""
        value = getattr(self, part)
        return value / self.total if self.total and value is not None else 0.0


@dataclass(frozen=True)
class LayerRouting:
    """One layer's routing.

    Attributes:
        name: of the layer.
        group: its group.
        shared: number of its A.
        tokens: how many counted; 0 where the weights are constant and no data were read.
        mean: mean weights, (E,).
        second: mean of w w^T, (E, E).
        token_entropy: mean entropy of a token's weights, in nats.
        variance: what the weights depend on; None if samples could not be told apart.
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
        """Of the mean weights, in nats: ln E if all experts are used alike."""
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
        """As plain values for JSON."""
        derived = ("entropy", "specialisation", "effective_experts")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}, "dead": list(self.dead())}


@dataclass(frozen=True)
class Agreement:
    """How alike layers of one group route, as means over pairs of layers.

    The agreement of two layers is 1 less the total variation distance of their mean weights: 1, the same; 0, they use
    different experts. Their correlation is that of the samples' mean weights about each layer's own mean, over samples
    and experts: 1, they react to the samples alike.

    Attributes:
        group: the group.
        sharing: agreement of pairs that share their A; None if there are none.
        others: of pairs that do not.
        sharing_correlation: their correlation; None where nothing varies.
        others_correlation: of the other pairs.
    """

    group: str
    sharing: float | None
    others: float | None
    sharing_correlation: float | None = None
    others_correlation: float | None = None


@dataclass(frozen=True)
class RoutingReport:
    """What the routers of an adapter do.

    Attributes:
        routing: `token`, `sequence`, `batch`, `static` or `uniform`.
        samples: how many were read.
        labels: in the order in which they came; empty: not known.
        layers: layer by layer, in the plan's order.
        agreements: group by group.
    """

    routing: str
    samples: int
    labels: tuple[str, ...]
    layers: tuple[LayerRouting, ...]
    agreements: tuple[Agreement, ...]

    @property
    def compares_labels(self) -> bool:
        """Whether there are labels to tell apart; of one alone nothing can be said of what it decides."""
        return len(self.labels) > 1

    @property
    def mixings(self) -> dict[str, Mixing]:
        """For `lily.analysis.rank.rank_report`: layers whose weights depend on the data."""
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
            found = set(layer.dead())
            out[layer.group] = out.get(layer.group, found) & found
        return {group: tuple(sorted(experts)) for group, experts in out.items() if experts}

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
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
    """Record the routing of every layer over data, in one pass; of a static adapter, its constant weights.

    Args:
        model: carries the adapter; its mode (train or eval) is as before afterwards.
        batches: what `model(**batch)`, `model(*batch)` or `model(batch)` takes. Not read where no weight depends on
            the data.
        labels: of all samples, in the batches' order.
        adapter: default: the active one.
        forward: how a batch goes through the model, for other kinds of batches.

    Raises:
        LilyError: if there is no such adapter or no batch, the adapter is settling, or there are not as many labels
            as samples.
    """
    found = find(model, adapter)
    fixed = {name: static_mixing(layer, found) for name, layer in found.layers.items()}
    recorders = {
        name: Recorder(found.layers[name].settings[found.name].num_B)
        for name, mixing in fixed.items()
        if mixing is None
    }
    samples = 0
    if recorders:
        if found.config.settled is not None:
            raise LilyError(
                f"adapter {found.name!r} was saved while it settles (settled={found.config.settled:g}); finish that "
                "training, or look at a checkpoint from before"
            )
        samples = _record(model, found, recorders, batches, forward or call)
        if labels is not None and len(labels) != samples:
            raise LilyError(f"{len(labels)} labels for {samples} samples; give one label for every sample")
    names = tuple(dict.fromkeys(str(label) for label in labels or ())) if recorders else ()
    ids = torch.tensor([names.index(str(label)) for label in labels or ()]) if names else None
    layers, sampled = [], {}
    for name, mixing in fixed.items():
        group = found.plan.group_of(name)
        where = (name, f"{group.name} ({group.out_features}, {group.in_features})", found.plan.slots[name].A)
        if mixing is not None:
            layers.append(_constant(where, mixing))
            continue
        layers.append(_recorded(where, recorders[name], names, ids))
        if recorders[name].aligned:
            sampled[name] = _deviations(recorders[name])
    return RoutingReport(str(found.config.routing), samples, names, tuple(layers), _agreements(layers, sampled))


@torch.no_grad()
def _record(
    model: nn.Module,
    found: Adapted,
    recorders: Mapping[str, Recorder],
    batches: Iterable[Batch],
    run: Callable[[nn.Module, Any], Any],
) -> int:
    samples = 0
    with evaluating(model, found):
        for name, recorder in recorders.items():
            found.layers[name].statistics[found.name] = recorder
        found.watch_masks()
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


def _constant(where: Where, mixing: Mixing) -> LayerRouting:
    entropy = float(torch.special.entr(mixing.mean).sum())
    return LayerRouting(*where, 0, *_plain(mixing.mean, mixing.second), entropy, Variance(0.0, 0.0, 0.0), {})


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
        sums: of the weights over each sample's tokens, (samples, E).
        tokens: of each sample, (samples,).
        ids: number of each sample's label, (samples,); None: no labels.
    """
    between = _between(sums, tokens)
    token = max(0.0, total - between)
    if ids is None or bool((ids == ids[0]).all()):
        return Variance(total, token, between)
    label = _between_labels(sums, tokens, ids)
    generator = torch.Generator().manual_seed(0)
    dealt = [
        _between_labels(sums, tokens, ids[torch.randperm(len(ids), generator=generator)]) for _ in range(PERMUTATIONS)
    ]
    beyond = sum(value >= label for value in dealt)
    chance = sum(dealt) / PERMUTATIONS
    return Variance(total, token, max(0.0, between - label), label, chance, (1 + beyond) / (1 + PERMUTATIONS))


def _between(sums: Tensor, tokens: Tensor) -> float:
    """Variance of the rows' means, weighted by their tokens and summed over experts."""
    kept = tokens > 0
    sums, tokens = sums[kept], tokens[kept]
    if not len(tokens):
        return 0.0
    means = sums / tokens.unsqueeze(-1)
    share = tokens / tokens.sum()
    return float((share * (means - share @ means).square().sum(-1)).sum())


def _between_labels(sums: Tensor, tokens: Tensor, ids: Tensor) -> float:
    one_hot = torch.nn.functional.one_hot(ids).double()
    return _between(one_hot.T @ sums, one_hot.T @ tokens)


def _deviations(recorder: Recorder) -> Tensor:
    """The samples' mean weights about the layer's mean over samples, flattened."""
    means = recorder.by_sample / recorder.tokens.clamp(min=1).unsqueeze(-1)
    return (means - means.mean(0)).flatten()


def _agreements(layers: Sequence[LayerRouting], sampled: Mapping[str, Tensor]) -> tuple[Agreement, ...]:
    by_group: dict[str, list[LayerRouting]] = {}
    for layer in layers:
        if len(layer.mean) > 1:
            by_group.setdefault(layer.group, []).append(layer)
    return tuple(_agreement(group, members, sampled) for group, members in by_group.items() if len(members) > 1)


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
