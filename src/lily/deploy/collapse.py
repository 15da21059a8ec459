"""Collapse: turn a data-dependent adapter into a static one, and measure the error.

The expert weights of each layer's router are averaged over the tokens of calibration data into one vector per layer.
With these constant weights the adapter merges and exports exactly. The error is the *drift*, measured on held-out
batches before the routers are removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lily.deploy.drift import Drift, divergence, is_distribution, kept_rows, outputs
from lily.errors import LilyError
from lily.layers.bank import Settled
from lily.layers.quantized import keep_differentiable
from lily.layers.router import Logits
from lily.layers.routing_statistics import TINY, RoutingStatistics, all_reduce
from lily.progress.progress import current
from lily.tuner.adapter import Adapted, find
from lily.tuner.recording import Batch, call, evaluating

Run = Callable[[nn.Module, Any], Any]
# Stages of its progress.
CALIBRATION, DRIFT, REFIT = "calibration", "drift", "re-fit"


@dataclass(frozen=True)
class LayerReport:
    """One layer's routing over the calibration data.

    Attributes:
        name: name of the layer.
        weights: the mean weights, which the static adapter uses, (experts,).
        uniformity: total variation distance of the mean from equal weights: 0 if equal, 1 - 1/experts for one expert.
        variance: variance of the weights over tokens, summed over experts; 0: the weights do not depend on the data.
        update_error: relative error of the layer's update with the mean weights on the held-out data (before any
            re-fit).
    """

    name: str
    weights: list[float]
    uniformity: float
    variance: float
    update_error: float | None = None


@dataclass
class CollapseReport:
    """Result of `collapse`.

    Attributes:
        adapter: name of the adapter.
        routing: the routing before.
        tokens: number of calibration tokens, without padding.
        layers: one report per routed layer.
        drift: drift of the static adapter.
        drift_before_refit: drift before the re-fit; None without one.
        refit_steps: steps of the re-fit; 0 if it was not kept.
        metrics: the task's metrics, `before` and `after`, if they were measured.
    """

    adapter: str
    routing: str
    tokens: int
    layers: list[LayerReport]
    drift: Drift
    drift_before_refit: Drift | None = None
    refit_steps: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def collapse(
    model: nn.Module,
    batches: Iterable[Batch],
    held_out: Iterable[Batch] | None = None,
    *,
    adapter: str | None = None,
    refit_steps: int = 0,
    refit_learning_rate: float = 1e-4,
    metric: Callable[[nn.Module], dict[str, float]] | None = None,
    forward: Run | None = None,
) -> CollapseReport:
    """Turn a data-dependent adapter into a static one, in place.

    One pass over `batches` averages each layer's routing (in float64, without padding by the attention mask, over all
    processes of a distributed run). One pass over `held_out` measures the drift. The report is also stored in the
    adapter's configuration, and so in its files and exports.

    Args:
        model: the model with the adapter; its mode (train or eval) is restored.
        batches: calibration data: arguments of `model(**batch)`, `model(*batch)` or `model(batch)`.
        held_out: batches for the drift; default: the calibration batches, which underestimates it.
        adapter: name of the adapter; default: the active one.
        refit_steps: steps in which the static adapter is distilled from the dynamic one on `batches`; kept only if the
            drift decreases.
        refit_learning_rate: learning rate of those steps (AdamW).
        metric: returns the task's metrics of a model; called before and after.
        forward: runs a batch through the model and returns its outputs; for other kinds of batches.

    Returns:
        The report.

    Raises:
        LilyError: if the adapter is static already, its update is not linear, or there is no batch.
    """
    adapted = find(model, adapter)
    config = adapted.config
    activations = (layer.settings[adapted.name].activation for layer in adapted.layers.values())
    bent = next((a for a in activations if a != "none"), None)
    if bent is not None:
        raise LilyError(
            f"adapter {adapted.name!r} has activation={bent!r}: even with static weights its update is not "
            "linear, so it cannot be merged or exported; use it unmerged"
        )
    if not config.dynamic:
        raise LilyError(
            f"adapter {adapted.name!r} (routing={config.routing!r}, num_B={config.num_B}) is static already; "
            "merge or export it directly"
        )
    if config.settled:
        raise LilyError(
            f"adapter {adapted.name!r} was saved while settling (settled={config.settled:g}): finish that training, "
            "whose result is static, or collapse an earlier checkpoint"
        )
    run = forward or call
    batches = list(batches)
    held_out = batches if held_out is None else list(held_out)
    if not batches or not held_out:
        raise LilyError("collapse needs calibration data, but there is no batch; give at least one")
    routing, told = str(config.routing), current()
    told.expect("", CALIBRATION, {"batch": len(batches)})
    told.expect("", DRIFT, {"batch": 3 * len(held_out) * (2 if refit_steps else 1)})
    told.expect("", REFIT, {"batch": 3 * refit_steps})
    with evaluating(model, adapted):
        before = metric(model) if metric else None
        with told.stage("", CALIBRATION):
            statistics = _record(model, adapted, batches, run)
        _add_logits(adapted, {name: s.mean.clamp(min=TINY).log() for name, s in statistics.items()})
        with told.stage("", DRIFT):
            drift, errors = _measure(model, adapted, held_out, run)
        report = CollapseReport(adapted.name, routing, int(next(iter(statistics.values())).count.item()), [], drift)
        if refit_steps:
            with told.stage("", REFIT):
                _refit(model, adapted, batches, held_out, run, refit_steps, refit_learning_rate, report)
        for name, s in statistics.items():
            w = torch.softmax(adapted.layers[name].logits_of(adapted.name).detach().double(), 0).cpu()
            uniformity = float((w - 1 / w.numel()).abs().sum() / 2)
            report.layers.append(LayerReport(name, w.tolist(), uniformity, s.variance, errors.get(name)))
        adapted.make_static()
        if metric and before is not None:
            report.metrics = {"before": before, "after": metric(model)}
    config.provenance = {**(config.provenance or {}), "collapse": report.to_dict()}
    return report


@torch.no_grad()
def _record(model: nn.Module, adapted: Adapted, batches: Sequence[Batch], run: Run) -> dict[str, RoutingStatistics]:
    experts = {name: layer.settings[adapted.name].num_B for name, layer in adapted.layers.items()}
    statistics = {name: RoutingStatistics.empty(count) for name, count in experts.items() if count > 1}
    for name, kept in statistics.items():
        adapted.layers[name].statistics[adapted.name] = kept
    adapted.watch_masks()
    for batch in batches:
        run(model, batch)
        current().advance(1, "batch")
    for name, kept in statistics.items():
        del adapted.layers[name].statistics[adapted.name]
        all_reduce(kept)
    if not any(kept.count.item() for kept in statistics.values()):
        raise LilyError("no adapted layer ran on the calibration batches; is the adapter active and enabled?")
    return statistics


@torch.no_grad()
def _add_logits(adapted: Adapted, logits: Mapping[str, Tensor]) -> None:
    """Add static weights to layers in addition to their routers, so that both can be compared."""
    for name, value in logits.items():
        layer = adapted.layers[name]
        like = layer.router_of(adapted.name)
        assert like is not None
        value = value.to(like.device, torch.promote_types(like.dtype, torch.float32))
        layer.lily_logits[adapted.name] = Logits(value, like.requires_grad)
    adapted.bank.settled[adapted.name] = Settled(0.0)


@contextlib.contextmanager
def _static(adapted: Adapted) -> Iterator[None]:
    settled = adapted.bank.settled[adapted.name]
    settled.move(1.0)
    try:
        yield
    finally:
        settled.move(0.0)


@torch.no_grad()
def _measure(
    model: nn.Module,
    adapted: Adapted,
    batches: Sequence[Batch],
    run: Run,
    exchange: Callable[[], None] = lambda: None,
) -> tuple[Drift, dict[str, float]]:
    """The drift over batches, and each layer's relative error on its inputs in the dynamic model.

    `exchange` swaps the shared tensors of the dynamic adapter in, and out again.
    """
    sums = {name: [0.0, 0.0] for name in adapted.layers}
    kl, error, norm, positions = 0.0, 0.0, 0.0, 0
    distributions = True
    for batch in batches:
        exchange()
        with _compared(adapted, sums):
            old = outputs(run(model, batch))
        exchange()
        with _static(adapted):
            new = outputs(run(model, batch))
        rows = kept_rows(old, batch, model)
        p, q = (t.reshape(-1, t.shape[-1])[rows].double() for t in (old, new))
        distributions = distributions and p.shape[-1] > 1 and is_distribution(model)
        if distributions:
            kl += divergence(p, q).item()
        error += float((p - q).square().sum())
        norm += float(p.square().sum())
        positions += p.shape[0]
        current().advance(3, "batch")
    moved = [v for pair in sums.values() for v in pair]
    packed = torch.tensor([kl, error, norm, positions, *moved], dtype=torch.float64)
    if dist.is_available() and dist.is_initialized():
        packed = packed.to(next(model.parameters()).device)
        dist.all_reduce(packed)
    kl, error, norm, count, *moved = packed.tolist()
    drift = Drift(kl / count if distributions and count else None, (error / norm) ** 0.5 if norm else 0.0, int(count))
    pairs = zip(sums, moved[::2], moved[1::2], strict=True)
    return drift, {name: (a / b) ** 0.5 if b else 0.0 for name, a, b in pairs}


@contextlib.contextmanager
def _compared(adapted: Adapted, sums: dict[str, list[float]]) -> Iterator[None]:
    """Context: every layer also computes its static update; adds the squared difference and norm to `sums`."""

    def compare(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], _: Any) -> None:
            if not args:
                return
            x = args[0]
            dynamic = layer.update_of(adapted.name, x).double()
            with _static(adapted):
                static = layer.update_of(adapted.name, x).double()
            sums[name][0] += float((dynamic - static).square().sum())
            sums[name][1] += float(dynamic.square().sum())

        return hook

    handles = [layer.register_forward_hook(compare(name)) for name, layer in adapted.layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refit(
    model: nn.Module,
    adapted: Adapted,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    run: Run,
    steps: int,
    rate: float,
    report: CollapseReport,
) -> None:
    """Train the static adapter to reproduce the dynamic one's outputs; keep the result if the drift decreases."""
    shared = [t for tensors in adapted.bank.tensors(adapted.name) for t in tensors]
    logits = [layer.logits_of(adapted.name) for layer in adapted.layers.values() if adapted.name in layer.lily_logits]
    student: list[Tensor] = [*shared, *logits]
    trained = {p: p.requires_grad for p in model.parameters()}
    teacher, first = ([t.detach().clone() for t in tensors] for tensors in (shared, student))

    def exchange() -> None:
        for mine, other in zip(shared, teacher, strict=True):
            kept = mine.data.clone()
            mine.data.copy_(other)
            other.copy_(kept)

    better = False
    keep_differentiable(model)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for t in student:
            t.requires_grad_(True)
        _distill(model, adapted, student, islice(cycle(batches), steps), run, steps, rate, exchange)
        drift, _ = _measure(model, adapted, held_out, run, exchange)
        report.drift_before_refit = report.drift
        better = drift.closer_than(report.drift)
        if better:
            report.drift, report.refit_steps = drift, steps
    finally:
        for parameter, wanted in trained.items():
            parameter.requires_grad_(wanted)
        if not better:
            with torch.no_grad():
                for t, value in zip(student, first, strict=True):
                    t.copy_(value)


def _distill(
    model: nn.Module,
    adapted: Adapted,
    student: list[Tensor],
    batches: Iterable[Batch],
    run: Run,
    steps: int,
    rate: float,
    exchange: Callable[[], None],
) -> None:
    optimizer = torch.optim.AdamW(student, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for batch in batches:
        with torch.no_grad():
            exchange()
            target = outputs(run(model, batch))
            exchange()
        with _static(adapted):
            out = outputs(run(model, batch))
        rows = kept_rows(out, batch, model)
        p, q = (t.reshape(-1, t.shape[-1])[rows].float() for t in (target, out))
        distributions = p.shape[-1] > 1 and is_distribution(model)
        loss = divergence(p, q) / p.shape[0] if distributions else F.mse_loss(q, p) / p.square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if dist.is_available() and dist.is_initialized():
            for t in student:
                if t.grad is not None:
                    dist.all_reduce(t.grad)
                    t.grad /= dist.get_world_size()
        torch.nn.utils.clip_grad_norm_(student, 1.0)
        optimizer.step()
        schedule.step()
        current().advance(3, "batch")
    optimizer.zero_grad(set_to_none=True)
