"""Settle: a routing that looks at the data becomes a static one while the adapter still learns.

Up to the fraction `start` of training nothing changes, but each layer's mean routing is recorded. Between `start` and
`end` the weights that are used move from the data's own to that running mean. After `end` the mean is an ordinary
learned vector and training goes on, which repairs what settling cost. The result is a static adapter: merging it and
exporting it are exact.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lily.errors import LilyError
from lily.layers.bank import Settled
from lily.layers.routing_statistics import TINY, RoutingStatistics
from lily.layers.sharding import is_sharded
from lily.plan.options import DYNAMIC
from lily.tuner.adapter import Adapted, find

# Steps that the running mean looks back, as a share of training.
WINDOW = 0.05


def share_settled(fraction: float, start: float, end: float) -> float:
    """How far the weights have moved, at a fraction of training: 0 up to `start`, 1 from `end` on."""
    if fraction >= end:
        return 1.0
    return max(0.0, (fraction - start) / (end - start))


class Settling:
    """Settles one adapter, driven by one's own training loop.

    Make it before the optimiser, whose parameters it adds to; call `step` before each optimiser step's forwards and
    `finish` after the last. Only forwards in training mode count, so evaluating in between changes nothing::

        settling = lily.Settling(model, total_steps=1000)
        optimiser = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        for step in range(1000):
            settling.step(step)
            ...
        settling.finish()

    Args:
        model: carries the adapter.
        total_steps: optimiser steps of the whole training; 0: given later as `total_steps`.
        start: fraction of training up to which the routing stays as it is.
        end: fraction from which on it is static.
        adapter: default: the active one.

    Raises:
        LilyError: if the fractions are no increasing pair in [0, 1), or the adapter's routing is static already.
    """

    def __init__(
        self, model: nn.Module, total_steps: int = 0, start: float = 0.6, end: float = 0.8, adapter: str | None = None
    ) -> None:
        check_fractions(start, end)
        self.start, self.end, self.total_steps = start, end, total_steps
        self.found: Adapted = find(model, adapter)
        config, name = self.found.config, self.found.name
        if config.num_B == 1 or config.routing not in DYNAMIC:
            raise LilyError(
                f"adapter {name!r} (routing={config.routing!r}, num_B={config.num_B}) is static already; "
                "there is nothing to settle"
            )
        if config.settled is None:
            config.settled = 0.0
        for layer in self.found.layers.values():
            if name not in layer.lily_logits:
                router = layer.lily_router[name].weight
                layer.lily_logits[name] = nn.Parameter(
                    torch.zeros(layer.settings[name].num_B, device=router.device, dtype=router.dtype),  # type: ignore[arg-type]
                    requires_grad=router.requires_grad,  # type: ignore[arg-type]
                )
        self.found.bank.settled[name] = Settled(config.settled)

    @property
    def logits(self) -> list[nn.Parameter]:
        """The learned vectors, one per layer; the optimiser must have them."""
        return [layer.lily_logits[self.found.name] for layer in self.found.layers.values()]

    @property
    def recording(self) -> bool:
        """Whether the routing is being recorded."""
        return any(self.found.name in layer.statistics for layer in self.found.layers.values())

    def step(self, step: int) -> None:
        """Move to where training is now.

        Args:
            step: optimiser steps done so far. May jump, as after a resume.
        """
        if not self.total_steps:
            raise LilyError("Settling does not know how long training is; give total_steps")
        if any(is_sharded(p) for p in self.logits):
            raise LilyError(
                "a routing cannot settle while an engine (FSDP, ZeRO-3) holds the adapter in parts; train under DDP, "
                "or without settle and collapse the adapter afterwards"
            )
        window = max(1, round(WINDOW * self.total_steps))
        first = max(0, round(self.start * self.total_steps) - window)
        share = share_settled(step / self.total_steps, self.start, self.end)
        if self.recording:
            self._note(age=max(1, step - first), window=window)
        self._record(first <= step and share < 1)
        if share != self.found.config.settled:
            self.found.config.settled = share
            self.found.bank.settled[self.found.name].move(share)

    def finish(self) -> None:
        """End as a plain static adapter: the routers are dropped.

        Raises:
            LilyError: if training ended before the routing had settled.
        """
        if self.found.config.settled != 1:
            self._record(False)
            raise LilyError(
                f"training ended before the routing settled (settled={self.found.config.settled:g}); "
                "train to the end, or lower `end`"
            )
        self.found.make_static()

    def _record(self, wanted: bool) -> None:
        if wanted == self.recording:
            return
        for layer in self.found.layers.values():
            if wanted:
                # Not in eval mode: an evaluation between two steps would bring its rows into what is learned, and a
                # resumed run, which does not repeat it, would end elsewhere.
                experts = layer.settings[self.found.name].num_B
                layer.statistics[self.found.name] = RoutingStatistics.empty(experts, training_only=True)
            else:
                layer.statistics.pop(self.found.name, None)
        self.found.watch_masks()

    @torch.no_grad()
    def _note(self, age: int, window: int) -> None:
        """Move each layer's running mean by what the last step saw, the same on all processes."""
        name, layers = self.found.name, list(self.found.layers.values())
        seen = [layer.statistics[name] for layer in layers]
        # One tensor for all layers: one exchange between processes, one wait for the device.
        packed = torch.cat([t.to(layers[0].lily_logits[name].device) for s in seen for t in (s.total, s.count)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(packed)
        sums = packed.split([t.numel() for s in seen for t in (s.total, s.count)])  # type: ignore[no-untyped-call]
        counts = torch.cat(sums[1::2]).tolist()
        if not any(counts):
            warnings.warn(
                "settling saw no token since the last step, because no forward ran in training mode; call "
                "model.train() before the training forwards",
                stacklevel=3,
            )
        for layer, statistics, total, count in zip(layers, seen, sums[::2], counts, strict=True):
            if count:
                logits = layer.lily_logits[name]
                old = torch.softmax(logits.double(), 0)
                mean = torch.lerp(old, (total / count).to(old.device), 1 / min(age, window))
                logits.copy_(mean.clamp(min=TINY).log())
            statistics.reset()


def check_fractions(start: float, end: float) -> None:
    """Refuse fractions between which nothing can settle.

    Raises:
        LilyError: unless 0 <= start < end < 1.
    """
    if not 0 <= start < end < 1:
        raise LilyError(f"settle start={start:g}, end={end:g}: give fractions of training with 0 <= start < end < 1")


class SettleCallback(TrainerCallback):  # type: ignore[misc]
    """Settles the adapter of a `Trainer` (transformers', TRL's): `Trainer(..., callbacks=[lily.SettleCallback()])`.

    Accumulation, several processes and resuming are taken into account. Checkpoints written in between load as what
    they are; the model after training, and every checkpoint after `end`, is a plain static adapter.

    Args:
        start: fraction of training up to which the routing stays as it is.
        end: fraction from which on it is static.
        adapter: default: the active one.
    """

    def __init__(self, start: float = 0.6, end: float = 0.8, adapter: str | None = None) -> None:
        check_fractions(start, end)
        self.start, self.end, self.adapter = start, end, adapter
        self.settling: Settling | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Before the trainer makes its optimiser."""
        self.settling = Settling(model, 0, self.start, self.end, self.adapter)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Refuse what would undo settling.

        Raises:
            LilyError: if the optimiser does not hold the static vectors, or a checkpoint from before they were used
                could be loaded at the end.
        """
        if args.load_best_model_at_end:
            raise LilyError(
                "load_best_model_at_end=True could bring back a checkpoint from before the routing settled; set it to "
                "False and choose among the checkpoints after `end`"
            )
        if self.settling is None:
            self.settling = Settling(model, 0, self.start, self.end, self.adapter)
        self.settling.total_steps = state.max_steps
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
        if any(id(p) not in held for p in self.settling.logits):
            raise LilyError(
                "the optimiser was made before the adapter got its static weights; let the Trainer make it, or give "
                "LilyConfig(settled=0.0), with which they are there from the start"
            )
        self.settling.step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After each optimiser step, and so before a checkpoint is written: move to where the next one is."""
        assert self.settling is not None
        self.settling.step(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make it a plain static adapter, if training came that far."""
        assert self.settling is not None
        if self.settling.found.config.settled == 1:
            self.settling.finish()
            self.settling = None  # another training starts with a static adapter, and says so
