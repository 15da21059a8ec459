"""Start A from data (`init_weights="data"`): its rows become the main directions of what its layers receive.

The user interface is that of `peft.tuners.lora.eva`. There each layer has its own A; here one A gets the inputs of all
layers that share it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lily.errors import LilyError
from lily.io.words import some
from lily.layers.bank import BANK, LilyBank
from lily.layers.layer import LilyLayer
from lily.layers.sharding import from_first, is_sharded, world_size
from lily.layers.starts import ROW_ENERGY, TopDirections, completed
from lily.plan.specs import UNSEEN
from lily.tuner.adapter import Adapted, find
from lily.tuner.base_inputs import base_inputs
from lily.tuner.recording import call

CALL = "lily.initialize_from_data(model, dataloader)"


@dataclass(frozen=True)
class DataStart:
    """What `initialize_from_data` did.

    Attributes:
        batches: how many the model was run on.
        converged: whether the directions had stopped turning.
        explained: first layer that uses an A -> share of its inputs' energy (sum of squares) that the rows of A span.
    """

    batches: int
    converged: bool
    explained: dict[str, float]


@torch.no_grad()
def initialize_from_data(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter: str | None = None,
    max_batches: int | None = None,
    tau: float = 0.99,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> DataStart:
    """Set the rows of each A to the top right singular vectors of the inputs of all layers that share it.

    The frozen base model runs over the batches, without padding by the attention mask, and an incremental SVD takes in
    the inputs until the directions have converged. All rows of an A have one norm, at which h has the variance on these
    data that the default start gives it: learning rates carry over. A layer's own A (`own_r`) gets the directions of
    that layer's inputs that the shared one lacks. B stays zero, so the model's outputs do not change; its mode, hooks,
    gradients and random state are restored.

    Args:
        model: the model with an untrained adapter whose configuration has `init_weights="data"`. If several processes
            train, all must call this, before the model is wrapped; their inputs are combined.
        dataloader: batches such as those of training: arguments of `model(**batch)`, `model(*batch)` or `model(batch)`.
        adapter: name of the adapter; default: the active one.
        max_batches: stop after this number; default: at the end of the dataloader.
        tau: an A has converged when the cosine of each of its directions before and after a batch is at least this.
        forward: runs a batch through the model; for other kinds of batches.

    Returns:
        Number of batches, and the share of the inputs that each A spans.

    Raises:
        LilyError: if the adapter is trained or configured otherwise, no layer has inputs that can be seen, an input is
            not finite, or there is no batch.
    """
    adapted = find(model, adapter)
    seen = _check(adapted)
    blocks, slots = adapted.plan.blocks, adapted.plan.slots
    shared = {
        slots[name].A: TopDirections(g.r // g.conv_groups, g.in_features)
        for g, names in blocks
        for name in names
        if name in seen
    }
    own = {
        name: TopDirections((group.r + group.own_r) // group.conv_groups, group.in_features)
        for group, names in blocks
        for name in names
        if name in seen and group.own_r
    }
    tops = [*shared.values(), *own.values()]
    sinks = {name: [shared[slots[name].A], *([own[name]] if name in own else [])] for name in seen}
    batches, run = 0, forward or call
    with base_inputs(model, adapted, partial(_collect, sinks), acting=True):
        for batch in islice(dataloader, max_batches):
            run(model, batch)
            batches += 1
            for top in tops:
                if not top.converged:
                    top.end_batch(tau)
            if all(top.converged for top in tops):
                break
    for top in tops:
        _combine(top)
    if not any(top.count for top in tops):
        what = "no adapted layer ran on the batches" if batches else "there is no batch"
        raise LilyError(f"the start from data needs inputs, but {what}; give at least one batch to {CALL}")
    explained = _write(adapted, seen, shared, own)
    adapted.bank.stop_waiting(adapted.name)
    return DataStart(batches, all(top.converged for top in tops), explained)


def _check(adapted: Adapted) -> dict[str, LilyLayer]:
    """The layers whose inputs can be seen."""
    name, start = adapted.name, adapted.config.init_weights
    if start != "data":
        raise LilyError(f"adapter {name!r} has init_weights={start!r}; the start from data is for init_weights='data'")
    seen = {
        layer: module
        for layer, module in adapted.layers.items()
        if adapted.plan.group_of(layer).kind not in UNSEEN
    }  # fmt: skip
    if not seen:
        raise LilyError(
            f"init_weights='data': adapter {name!r} adapts embeddings and parameters only, whose inputs are indices or "
            "not visible; use init_weights=True or 'orthonormal'"
        )
    tensors_A, tensors_B = adapted.bank.tensors(name)
    if any(is_sharded(p) for p in (*tensors_A, *tensors_B)):
        raise LilyError(f"the tensors of adapter {name!r} are sharded; call {CALL} before the model is wrapped")
    for layer, module in seen.items():
        own = [module.lily_own_B[name].weight] if name in module.lily_own_B else []
        if any(bool(B.any()) for B in (tensors_B[adapted.plan.slots[layer].B], *own)):
            raise LilyError(
                f"adapter {name!r} is trained already (its B is not zero), and another A would change what it does; "
                f"call {CALL} on a new adapter"
            )
    return seen


def _collect(sinks: Mapping[str, list[TopDirections]], name: str, inputs: Tensor) -> None:
    open_tops = [top for top in sinks.get(name, ()) if not top.converged]
    if open_tops and not torch.isfinite(inputs).all():
        raise LilyError(f"the start from data: the input of {name} is not finite; check the batches and the precision")
    for top in open_tops:
        if len(inputs):
            top.add(inputs.float())


def _combine(top: TopDirections) -> None:
    """Add what the other processes have seen; all then have the same."""
    if world_size() == 1:
        return
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, (top.kept.cpu(), top.energy, top.count))
    top.kept = torch.zeros_like(top.kept, device="cpu")
    top.energy, top.count = sum(part[1] for part in parts), sum(part[2] for part in parts)
    for kept, _, _ in parts:
        top.stack(kept)


def _write(
    adapted: Adapted,
    seen: Mapping[str, LilyLayer],
    shared: Mapping[int, TopDirections],
    own: Mapping[str, TopDirections],
) -> dict[str, float]:
    """Set every A, and warn of what stays random."""
    explained: dict[str, float] = {}
    random, short = [name for name in adapted.layers if name not in seen], []
    for number, (group, names) in enumerate(adapted.plan.blocks):
        if number not in shared:
            continue
        top, A = shared[number], adapted.bank.tensors(adapted.name)[0][number]
        parts = group.conv_groups  # each group of a convolution starts with the same directions
        r, own_r = group.r // parts, group.own_r // parts
        found, _ = top.top(r)
        if not len(found):  # never called, or zeros alone
            random += names
            continue
        rows = completed(found, A[len(found) : r].to(found))
        energy = float((top.kept @ rows.T).square().sum())
        scale = (ROW_ENERGY * r / group.in_features * top.energy / energy) ** 0.5
        A.copy_(from_first((scale * rows).cpu().repeat(parts, 1)))
        explained[names[0]] = min(1.0, float((top.kept @ found.T).square().sum()) / top.energy)
        short += [f"{names[0]} ({len(found)} of {r})"] if len(found) < r else []
        basis = rows[: group.in_features]
        for name in (name for name in names if name in own):
            own_A = cast(Tensor, seen[name].lily_own_A[adapted.name].weight)
            more, _ = own[name].top(own_r, basis.to(own[name].kept))
            both = torch.cat((basis, more.to(basis)))
            own_rows = completed(both, own_A[len(more) : own_r].to(both))[len(basis) :]
            own_A.copy_(from_first((scale * own_rows).cpu().repeat(parts, 1)))
            short += [f"{name} ({len(more)} of own_r={own_r})"] if len(more) < own_r else []
    if random:
        warnings.warn(
            f"init_weights='data': {len(random)} layers keep the default start, because their inputs are indices, not "
            f"visible (parameters), zero, or they were not called: {some(random)}",
            stacklevel=4,
        )
    if short:
        warnings.warn(
            "init_weights='data': the inputs have fewer directions than A has rows; the others stay random and "
            f"orthogonal to them: {some(short)}",
            stacklevel=4,
        )
    return explained


class Awaiting:
    """A hook on the root's forwards: warns at the first one of training if A has not been started from data.

    Args:
        root: the model that holds the bank.
        adapter: name of the adapter.
    """

    def __init__(self, root: nn.Module, adapter: str) -> None:
        self.adapter = adapter
        self.handle = root.register_forward_pre_hook(self)

    def __call__(self, root: nn.Module, args: Any) -> None:
        """Before a forward; a compiled one is not looked at, and saving warns."""
        if torch.compiler.is_compiling() or not (root.training and torch.is_grad_enabled()):
            return
        bank = getattr(root, BANK, None)
        if bank is None or bank.awaiting.get(self.adapter) is not self:
            self.handle.remove()
        elif any(bool(B.any()) for B in bank.tensors(self.adapter)[1]):  # its values were loaded in another way
            bank.stop_waiting(self.adapter)
        else:
            warn_if_awaiting(bank, self.adapter)


def warn_if_awaiting(bank: LilyBank, adapter: str) -> None:
    """Warn, once, if an adapter with `init_weights="data"` is used without its start from data."""
    if bank.stop_waiting(adapter):
        warnings.warn(
            f"adapter {adapter!r} has init_weights='data', but no data were given, so A has the default start; call "
            f"{CALL} before training, or use init_weights=True",
            stacklevel=4,
        )
