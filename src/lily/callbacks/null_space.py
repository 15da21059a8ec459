"""Null-space projection: A reads nothing of what general text uses, so that training changes less there.

The method is projected gradient descent: after each optimizer step the rows of A are projected onto the orthogonal
complement of the main directions of the layers' inputs on a calibration set. Gradient projection memory
(arXiv 2103.09762) and Adam-NSCL (arXiv 2103.07113) do so with whole weights. A is projected in place, so forwards,
files, merges and exports need nothing, and a permutation, sign or gain of its rows changes nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lily.errors import LilyError
from lily.io.atomic import write_bytes
from lily.io.untrusted import read_header, read_tensors
from lily.io.words import some
from lily.layers.sharding import is_sharded
from lily.plan.sharing_plan import SharingPlan
from lily.plan.specs import UNSEEN
from lily.tuner.adapter import Adapted, find
from lily.tuner.base_inputs import base_inputs
from lily.tuner.recording import Batch, call

# Share of A in the span, above which a resumed training used other directions. Rounding A to bfloat16 gives 0.002.
FOREIGN = 0.01


class NullSpace:
    """The input directions that an adapter does not read; made by `null_space` or `NullSpace.load`.

    It projects A when it is made. Call `apply` after each optimizer step, or register it once::

        projection = lily.null_space(model, calibration_batches)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        optimizer.register_step_post_hook(projection.apply)

    Args:
        model: carries the adapter.
        directions: number of an A in the bank -> orthonormal rows (k, in).
        adapter: default: the active one.

    Attributes:
        adapted: the adapter.

    Raises:
        LilyError: if no A has directions, or an engine shards the adapter.
    """

    def __init__(self, model: nn.Module, directions: Mapping[int, Tensor], adapter: str | None = None) -> None:
        self.adapted: Adapted = find(model, adapter)
        self._spans = dict(directions)
        _warn_of_unprojected(self.adapted, self._spans)
        self.apply()

    @property
    def directions(self) -> dict[str, Tensor]:
        """Layer -> orthonormal rows (k, in), the same tensor for layers that share an A."""
        slots = self.adapted.plan.slots
        return {name: self._spans[slot.A] for name, slot in slots.items() if slot.A in self._spans}

    @torch.no_grad()
    def apply(self, *_: object) -> None:
        """Project every A, and the layers' own A. Takes the arguments of an optimizer's post hook, and ignores them.

        Raises:
            LilyError: if an engine shards the adapter.
        """
        for A, span in self._projected():
            wide = A.to(span.dtype)
            A.copy_(wide - (wide @ span.mT) @ span)

    @torch.no_grad()
    def residual(self) -> float:
        """The largest share of an A's norm that is in its span: 0 up to rounding, after `apply`."""
        shares = [
            (A.to(span.dtype) @ span.mT).norm() / A.to(span.dtype).norm().clamp(min=torch.finfo(span.dtype).tiny)
            for A, span in self._projected()
        ]
        return max(float(share) for share in shares)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the directions as safetensors, each span under the name of the first layer that uses it."""
        blocks = self.adapted.plan.blocks
        tensors = {blocks[number][1][0]: span.cpu().contiguous() for number, span in self._spans.items()}
        write_bytes(file, save(tensors))

    @classmethod
    def load(cls, model: nn.Module, file: str | os.PathLike[str], adapter: str | None = None) -> NullSpace:
        """Read what `save` has written, instead of running the model over the calibration set again.

        Args:
            model: carries the adapter.
            file: the file.
            adapter: default: the active one.

        Raises:
            LilyError: if the file is damaged, or is not for an adapter that is shared in this way.
        """
        adapted = find(model, adapter)
        numbers = {names[0]: number for number, (_, names) in enumerate(adapted.plan.blocks)}
        spans = {}
        for name, span in read_tensors(read_header(Path(file))).items():
            width = adapted.plan.blocks[numbers[name]][0].in_features if name in numbers else None
            if span.ndim != 2 or span.shape[1] != width or not span.is_floating_point():
                raise LilyError(
                    f"{file}: {name!r} of shape {tuple(span.shape)} fits no A of adapter {adapted.name!r}, which were "
                    "shared in another way, or are of another model; calibrate again with lily.null_space"
                )
            spans[numbers[name]] = span
        return cls(model, spans, adapted.name)

    def _projected(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor to project with its span, on one device. Read anew each time: `.to` replaces the tensors."""
        adapted, name = self.adapted, self.adapted.name
        for number, A in _shared_A(adapted):
            if number in self._spans:
                self._spans[number] = self._spans[number].to(A.device)
                yield A, self._spans[number]
        for path, layer in adapted.layers.items():
            span = self._spans.get(adapted.plan.slots[path].A)
            if span is not None and name in layer.lily_own_A:
                own = layer.lily_own_A[name].weight
                assert isinstance(own, Tensor)
                yield own, span.to(own.device)


def null_space(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    energy: float = 0.9,
    rank: int | None = None,
    max_batches: int | None = None,
    adapter: str | None = None,
) -> NullSpace:
    """Find the main directions of the base model's inputs on a calibration set, and project A out of them.

    For each shared A, the uncentered second moment `sum x x^T` of the inputs of all layers that share it is summed,
    without padding. Its leading eigenvectors are the directions. Call it before training, on batches in a fixed order:
    a resumed run calls it again, or uses `NullSpace.load`. In several processes, each passes its part of the batches.

    Args:
        model: carries the adapter; it runs in eval mode with all adapters off.
        batches: keyword arguments, positional arguments or the input of the model, such as a `DataLoader` has them.
        energy: share of the inputs' squared norm that the directions of each A hold.
        rank: number of directions of each A, instead of `energy`.
        max_batches: use at most this many batches.
        adapter: default: the active one.

    Returns:
        The projection, applied once.

    Raises:
        LilyError: for an invalid energy or rank, without batches, if the inputs are not finite, or if the directions
            leave nothing for an A to read. Embeddings and parameters are not projected; a warning names them.
    """
    if not 0 < energy <= 1:
        raise LilyError(f"energy={energy:g} is not a share; give a number above 0, at most 1")
    if rank is not None and rank < 1:
        raise LilyError(f"rank={rank} is not valid; give the number of directions, at least 1")
    adapted = find(model, adapter)
    plan = adapted.plan
    tensors = dict(_shared_A(adapted))
    moments: dict[int, Tensor] = {}

    def see(name: str, rows: Tensor) -> None:
        number = plan.slots[name].A
        if number not in moments:
            moments[number] = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            wide = rows.to(moments[number])
            moments[number].addmm_(wide.mT, wide)

    count = 0
    with base_inputs(model, adapted, see):
        for batch in islice(batches, max_batches):
            call(model, batch)
            count += 1
    if not count:
        raise LilyError("null_space needs a calibration set, and got no batch")
    spans = {}
    for number, A in tensors.items():
        if plan.blocks[number][0].kind in UNSEEN:
            continue  # of an embedding, a moment would be (rows, rows)
        moment = _summed(moments.get(number), A)
        names, r = plan.blocks[number][1], A.shape[0]
        if not torch.isfinite(moment).all():
            raise LilyError(f"the inputs of {names[0]} on the calibration set hold NaN or infinity; check the batches")
        span = _leading(moment, energy, rank)
        if not len(span):
            continue
        free = A.shape[1] - len(span)
        if not free:
            raise LilyError(
                f"{len(span)} directions leave nothing for the A of {names[0]} to read (in={A.shape[1]}); lower "
                "energy or rank"
            )
        if free < r:
            warnings.warn(
                f"{len(span)} directions leave {free} of {A.shape[1]} for the A of {names[0]}, less than its rank {r}; "
                "lower energy or rank",
                stacklevel=2,
            )
        spans[number] = span.to(A.device, torch.promote_types(A.dtype, torch.float32))
    return NullSpace(model, spans, adapted.name)


def _shared_A(adapted: Adapted) -> Iterator[tuple[int, nn.Parameter]]:
    """Number and tensor of each A.

    Raises:
        LilyError: if it is sharded, or has no values yet.
    """
    held, _ = adapted.bank.tensors(adapted.name)
    for number in range(len(adapted.plan.blocks)):
        A = getattr(held, str(number))
        # FSDP1 replaces a parameter by a tensor whose memory it frees
        if not isinstance(A, nn.Parameter) or is_sharded(A) or A.is_meta:
            raise LilyError(
                f"an A of adapter {adapted.name!r} is sharded (FSDP, ZeRO-3) or on the meta device, so it cannot be "
                "projected; train in one process or under DDP, with the adapter's weights loaded"
            )
        yield number, A


def _summed(moment: Tensor | None, A: Tensor) -> Tensor:
    """The moment (in, in) over all processes; zero where no input was seen."""
    if moment is None:
        moment = torch.zeros(A.shape[1], A.shape[1], device=A.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(moment)
    return moment


def _leading(moment: Tensor, energy: float, rank: int | None) -> Tensor:
    """The leading eigenvectors of a moment (in, in) as rows, no more than it has by its precision."""
    if moment.device.type == "mps":  # has no float64
        moment = moment.cpu()
    values, vectors = torch.linalg.eigh(moment.double())  # ascending
    values, vectors = values.flip(0), vectors.flip(1)
    nonzero = int((values > values[0] * len(values) * torch.finfo(torch.float32).eps).sum())
    energies = values.clamp(min=0).cumsum(0)
    wanted = rank or int(torch.searchsorted(energies, energy * energies[-1])) + 1
    span: Tensor = vectors[:, : min(wanted, nonzero)].mT.contiguous()
    return span


def _warn_of_unprojected(adapted: Adapted, spans: Mapping[int, Tensor]) -> None:
    plan: SharingPlan = adapted.plan
    left = [name for name, slot in plan.slots.items() if slot.A not in spans]
    if len(left) == len(plan.slots):
        raise LilyError(
            f"no A of adapter {adapted.name!r} can be projected: its layers are embeddings or parameters, whose inputs "
            "are not vectors that A reads, or the calibration set never reaches them"
        )
    if left:
        warnings.warn(
            f"{len(left)} of {len(plan.slots)} adapted layers are not projected: {some(left)}. Embeddings and "
            "parameters (target_parameters) have no input vectors, and the others got none from the calibration set",
            stacklevel=4,
        )


class NullSpaceCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps A projected in a `Trainer` (transformers', TRL's).

    `Trainer(..., callbacks=[lily.NullSpaceCallback(lily.null_space(model, batches))])`. Checkpoints hold the projected
    A. To resume, make the projection again before the trainer, or load it: a resumed run then equals an uninterrupted
    one.

    Args:
        projection: of the model that the trainer trains.
    """

    def __init__(self, projection: NullSpace) -> None:
        self.projection = projection

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Project once; in a resumed training, check that the checkpoint was projected in the same way.

        Raises:
            LilyError: if the projection is of another model, or the checkpoint has other directions.
        """
        adapted = self.projection.adapted
        if find(kw["model"], adapted.name).bank is not adapted.bank:
            raise LilyError("the projection was made of another model; call lily.null_space with the trainer's")
        if not state.global_step:
            self.projection.apply()
        # Not projected again: its rounding would make a resumed run differ from an uninterrupted one.
        elif (share := self.projection.residual()) > FOREIGN:
            raise LilyError(
                f"the checkpoint was not trained with this projection ({share:.0%} of an A is in its span); calibrate "
                "on the same batches in the same order, or keep the directions with save and NullSpace.load"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Project after each step of the optimizer."""
        self.projection.apply()
