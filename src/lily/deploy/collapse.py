"""Collapse: a data-dependent adapter becomes a static one, and what that costs is measured.

The weights that each layer's router gave over calibration data are averaged, token by token, into one vector per
layer. With it the adapter no longer looks at the data, so it merges and exports exactly; how much it lost is the
*drift*, measured on held-out batches before the routers are dropped.
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
from lily.layers.routing_statistics import TINY, RoutingStatistics, all_reduce
from lily.tuner.adapter import Adapted, find
from lily.tuner.recording import Batch, call, evaluating

Run = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class LayerReport:
    """One layer's routing over the calibration data.

    Attributes:
        name: of the layer.
        weights: the mean, which the static adapter uses.
        uniformity: total variation distance of that mean from equal weights: 0 equal, 1 - 1/experts one expert alone.
        variance: of the weight vector over tokens, summed over experts; 0: this layer does not look at the data.
        update_error: how far the mean moves the layer's update on the held-out data, as a share of its norm (before
            any re-fit).
    """

    name: str
    weights: list[float]
    uniformity: float
    variance: float
    update_error: float | None = None


@dataclass
class CollapseReport:
    """What `collapse` did and what it cost.

    Attributes:
        adapter: its name.
        routing: what the routing was.
        tokens: calibration tokens that counted.
        layers: layer by layer.
        drift: of the static adapter as it is now.
        drift_before_refit: what it was before the re-fit; None without one.
        refit_steps: steps of the re-fit that were kept.
        metrics: the task's own metrics, `before` and `after`, where they were measured.
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
        """As plain values for JSON."""
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

    One pass over `batches` averages each layer's routing (float64, padding left out by the attention mask, summed over
    all processes of a distributed run). One pass over `held_out` measures the drift. The report is also kept in the
    adapter's configuration, so its files and exports carry it.

    Args:
        model: carries the adapter; its mode (train or eval) is as before afterwards.
        batches: calibration data: what `model(**batch)`, `model(*batch)` or `model(batch)` takes.
        held_out: for the drift; default: the calibration batches again, which flatters it.
        adapter: default: the active one.
        refit_steps: steps of distillation of the static adapter from the dynamic one on `batches`; kept only if the
            drift gets smaller.
        refit_learning_rate: of those steps (AdamW).
        metric: the task's metrics of a model, measured before and after.
        forward: how a batch goes through the model, returning its outputs; for other kinds of batches.

    Returns:
        The report; `print(report.to_dict())` or `lily collapse`.

    Raises:
        LilyError: if the adapter is static already, its update is not linear, or there is no batch.
    """
    found = find(model, adapter)
    config = found.config
    bent = next((a for layer in found.layers.values() if (a := layer.settings[found.name].activation) != "none"), None)
    if bent is not None:
        raise LilyError(
            f"adapter {found.name!r} has activation={bent!r}: even with static weights its update is not "
            "linear, so it merges and exports to nothing; use it unmerged"
        )
    if not config.dynamic:
        raise LilyError(
            f"adapter {found.name!r} (routing={config.routing!r}, num_B={config.num_B}) is static already; "
            "merge or export it as it is"
        )
    if config.settled:
        raise LilyError(
            f"adapter {found.name!r} was saved while it settles (settled={config.settled:g}): finish that training, "
            "whose result is static, or collapse a checkpoint from before"
        )
    run = forward or call
    batches = list(batches)
    held_out = batches if held_out is None else list(held_out)
    if not batches or not held_out:
        raise LilyError("collapse needs calibration data, but there is no batch; give at least one")
    routing = str(config.routing)
    with evaluating(model, found):
        before = metric(model) if metric else None
        statistics = _record(model, found, batches, run)
        logits = {name: s.mean.clamp(min=TINY).log() for name, s in statistics.items()}
        _settle_on(found, logits)
        drift, errors = _measure(model, found, held_out, run)
        report = CollapseReport(found.name, routing, int(next(iter(statistics.values())).count.item()), [], drift)
        if refit_steps:
            _refit(model, found, batches, held_out, run, refit_steps, refit_learning_rate, report)
        report.layers = [
            _layer_report(name, s, found.layers[name].lily_logits[found.name], errors.get(name))
            for name, s in statistics.items()
        ]
        found.make_static()
        if metric and before is not None:
            report.metrics = {"before": before, "after": metric(model)}
    config.provenance = {**(config.provenance or {}), "collapse": report.to_dict()}
    return report


@torch.no_grad()
def _record(model: nn.Module, found: Adapted, batches: Sequence[Batch], run: Run) -> dict[str, RoutingStatistics]:
    statistics = {
        name: RoutingStatistics.empty(layer.settings[found.name].num_B)
        for name, layer in found.layers.items()
        if layer.settings[found.name].num_B > 1
    }
    for name, kept in statistics.items():
        found.layers[name].statistics[found.name] = kept
    found.watch_masks()
    for batch in batches:
        run(model, batch)
    for name, kept in statistics.items():
        del found.layers[name].statistics[found.name]
        all_reduce(kept)
    if not any(kept.count.item() for kept in statistics.values()):
        raise LilyError("no adapted layer ran on the calibration batches; is the adapter active and enabled?")
    return statistics


@torch.no_grad()
def _settle_on(found: Adapted, logits: Mapping[str, Tensor]) -> None:
    """Give layers their static weights beside their routers, so that both can be compared."""
    for name, value in logits.items():
        layer = found.layers[name]
        like = layer.router_of(found.name)
        assert like is not None
        parameter = nn.Parameter(value.to(like.device, torch.float32), requires_grad=like.requires_grad)
        layer.lily_logits[found.name] = parameter
    found.bank.settled[found.name] = Settled(0.0)


@contextlib.contextmanager
def _static(found: Adapted) -> Iterator[None]:
    settled = found.bank.settled[found.name]
    settled.move(1.0)
    try:
        yield
    finally:
        settled.move(0.0)


@torch.no_grad()
def _measure(
    model: nn.Module,
    found: Adapted,
    batches: Sequence[Batch],
    run: Run,
    exchange: Callable[[], None] = lambda: None,
) -> tuple[Drift, dict[str, float]]:
    """The drift over batches, and each layer's own error on the inputs that it gets from the dynamic adapter.

    `exchange` swaps the shared tensors of the dynamic adapter in, and out again.
    """
    sums = {name: [0.0, 0.0] for name in found.layers}
    kl, error, norm, positions = 0.0, 0.0, 0.0, 0
    distributions = True
    for batch in batches:
        exchange()
        with _compared(found, sums):
            old = outputs(run(model, batch))
        exchange()
        with _static(found):
            new = outputs(run(model, batch))
        rows = kept_rows(old, batch, model)
        p, q = (t.reshape(-1, t.shape[-1])[rows].double() for t in (old, new))
        distributions = distributions and p.shape[-1] > 1 and is_distribution(model)
        if distributions:
            kl += divergence(p, q).item()
        error += float((p - q).square().sum())
        norm += float(p.square().sum())
        positions += p.shape[0]
    packed = torch.tensor(
        [kl, error, norm, positions, *(v for pair in sums.values() for v in pair)], dtype=torch.float64
    )
    if dist.is_available() and dist.is_initialized():
        packed = packed.to(next(model.parameters()).device)
        dist.all_reduce(packed)
    kl, error, norm, count, *moved = packed.tolist()
    drift = Drift(kl / count if distributions and count else None, (error / norm) ** 0.5 if norm else 0.0, int(count))
    pairs = zip(sums, moved[::2], moved[1::2], strict=True)
    return drift, {name: (a / b) ** 0.5 if b else 0.0 for name, a, b in pairs}


@contextlib.contextmanager
def _compared(found: Adapted, sums: dict[str, list[float]]) -> Iterator[None]:
    """Within: every layer also computes its static update, and the difference is summed."""

    def compare(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], _: Any) -> None:
            if not args:
                return
            x = args[0]
            dynamic = layer.update_of(found.name, x).double()
            with _static(found):
                static = layer.update_of(found.name, x).double()
            sums[name][0] += float((dynamic - static).square().sum())
            sums[name][1] += float(dynamic.square().sum())

        return hook

    handles = [layer.register_forward_hook(compare(name)) for name, layer in found.layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_report(name: str, seen: RoutingStatistics, logits: Tensor, error: float | None) -> LayerReport:
    w = torch.softmax(logits.detach().double(), 0).cpu()
    uniformity = float((w - 1 / w.numel()).abs().sum() / 2)
    return LayerReport(name, w.tolist(), uniformity, seen.variance, error)


def _refit(
    model: nn.Module,
    found: Adapted,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    run: Run,
    steps: int,
    rate: float,
    report: CollapseReport,
) -> None:
    """Train the static adapter to give the dynamic one's outputs; keep it if the drift got smaller."""
    shared = [t for tensors in found.bank.tensors(found.name) for t in tensors]
    logits = [layer.lily_logits[found.name] for layer in found.layers.values() if found.name in layer.lily_logits]
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
        _distil(model, found, student, islice(cycle(batches), steps), run, steps, rate, exchange)
        drift, _ = _measure(model, found, held_out, run, exchange)
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


def _distil(
    model: nn.Module,
    found: Adapted,
    student: list[Tensor],
    batches: Iterable[Batch],
    run: Run,
    steps: int,
    rate: float,
    exchange: Callable[[], None],
) -> None:
    optimiser = torch.optim.AdamW(student, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for batch in batches:
        with torch.no_grad():
            exchange()
            target = outputs(run(model, batch))
            exchange()
        with _static(found):
            out = outputs(run(model, batch))
        rows = kept_rows(out, batch, model)
        p, q = (t.reshape(-1, t.shape[-1])[rows].float() for t in (target, out))
        distributions = p.shape[-1] > 1 and is_distribution(model)
        loss = divergence(p, q) / p.shape[0] if distributions else F.mse_loss(q, p) / p.square().mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if dist.is_available() and dist.is_initialized():
            for t in student:
                if t.grad is not None:
                    dist.all_reduce(t.grad)
                    t.grad /= dist.get_world_size()
        torch.nn.utils.clip_grad_norm_(student, 1.0)
        optimiser.step()
        schedule.step()
    optimiser.zero_grad(set_to_none=True)
