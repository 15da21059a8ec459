"""Settle: a data-dependent routing becomes static while the adapter still trains.

Up to the fraction `start` of training nothing changes, except that each layer's mean routing is recorded. Between
`start` and `end` the expert weights are interpolated from the data-dependent ones to that running mean. After `end` the
mean is an ordinary learned vector and training continues, which recovers what settling cost. The result is a static
adapter: merging and exporting it are exact.
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
from lily.layers.router import Logits
from lily.layers.routing_statistics import TINY, RoutingStatistics
from lily.layers.sharding import is_sharded
from lily.plan.options import DYNAMIC
from lily.tuner.adapter import Adapted, find

# Window of the running mean, as a share of training.
WINDOW = 0.05


def share_settled(fraction: float, start: float, end: float) -> float:
    """The share of the static weights at a fraction of training: 0 up to `start`, 1 after `end`."""
    if fraction >= end:
        return 1.0
    return max(0.0, (fraction - start) / (end - start))


class Settling:
    """Settles one adapter in a custom training loop.

    Create it before the optimizer, because it adds parameters; call `step` before the forward passes of each optimizer
    step and `finish` after the last. Only forward passes in training mode count, so evaluation changes nothing::

        settling = lily.Settling(model, total_steps=1000)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        for step in range(1000):
            settling.step(step)
            ...
        settling.finish()

    Args:
        model: carries the adapter.
        total_steps: optimizer steps of the whole training; 0: set the attribute `total_steps` later.
        start: fraction of training up to which the routing is unchanged.
        end: fraction of training after which it is static.
        adapter: default: the active one.

    Raises:
        LilyError: unless 0 <= start < end < 1, or if the adapter's routing is static already.
    """

    def __init__(
        self, model: nn.Module, total_steps: int = 0, start: float = 0.6, end: float = 0.8, adapter: str | None = None
    ) -> None:
        check_fractions(start, end)
        self.start, self.end, self.total_steps = start, end, total_steps
        self.adapted: Adapted = find(model, adapter)
        config, name = self.adapted.config, self.adapted.name
        # Groups may differ in `num_B`; with one B there is nothing to mix.
        self.layers = [layer for layer in self.adapted.layers.values() if layer.settings[name].num_B > 1]
        if not self.layers or config.routing not in DYNAMIC:
            raise LilyError(
                f"adapter {name!r} (routing={config.routing!r}, num_B={config.num_B}) is static already; "
                "there is nothing to settle"
            )
        if config.settled is None:
            config.settled = 0.0
        for layer in self.layers:
            if name not in layer.lily_logits:
                router = layer.router_of(name)
                assert router is not None  # the routing depends on data
                layer.lily_logits[name] = Logits(router.new_zeros(len(router)), router.requires_grad)
        self.adapted.bank.settled[name] = Settled(config.settled)

    @property
    def logits(self) -> list[nn.Parameter]:
        """The learned vectors, one per layer with several experts; the optimizer must contain them."""
        return [layer.logits_of(self.adapted.name) for layer in self.layers]

    @property
    def recording(self) -> bool:
        """Whether the routing is being recorded."""
        return any(self.adapted.name in layer.statistics for layer in self.layers)

    def step(self, step: int) -> None:
        """Interpolate according to the progress of training.

        Args:
            step: optimizer steps done so far. May jump, as after a resume.

        Raises:
            LilyError: without `total_steps`, or if an engine shards the adapter.
        """
        if not self.total_steps:
            raise LilyError("settling needs the length of training; set total_steps")
        if any(is_sharded(p) for p in self.logits):
            raise LilyError(
                "a routing cannot settle while an engine (FSDP, ZeRO-3) shards the adapter; train under DDP, or "
                "without settle and collapse the adapter afterwards"
            )
        window = max(1, round(WINDOW * self.total_steps))
        first = max(0, round(self.start * self.total_steps) - window)
        share = share_settled(step / self.total_steps, self.start, self.end)
        if self.recording:
            self._note(age=max(1, step - first), window=window)
        self._record(first <= step and share < 1)
        if share != self.adapted.config.settled:
            self.adapted.config.settled = share
            self.adapted.bank.settled[self.adapted.name].move(share)

    def finish(self) -> None:
        """Convert to a plain static adapter: the routers are dropped.

        Raises:
            LilyError: if training ended before the routing had settled.
        """
        if self.adapted.config.settled != 1:
            self._record(False)
            raise LilyError(
                f"training ended before the routing settled (settled={self.adapted.config.settled:g}); "
                "train to the end, or lower `end`"
            )
        self.adapted.make_static()

    def _record(self, wanted: bool) -> None:
        if wanted == self.recording:
            return
        for layer in self.layers:
            if wanted:
                # Not in eval mode: evaluation rows would leak into what is learned, and a resumed run, which does not
                # repeat the evaluation, would give another result.
                experts = layer.settings[self.adapted.name].num_B
                layer.statistics[self.adapted.name] = RoutingStatistics.empty(experts, training_only=True)
            else:
                layer.statistics.pop(self.adapted.name, None)
        self.adapted.watch_masks()

    @torch.no_grad()
    def _note(self, age: int, window: int) -> None:
        """Update each layer's running mean with the last step's statistics, the same on all processes."""
        name, layers = self.adapted.name, self.layers
        seen = [layer.statistics[name] for layer in layers]
        # One tensor for all layers: one reduction and one device synchronization.
        packed = torch.cat([t.to(layers[0].logits_of(name).device) for s in seen for t in (s.total, s.count)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(packed)
        sums = packed.split([t.numel() for s in seen for t in (s.total, s.count)])  # type: ignore[no-untyped-call]
        counts = torch.cat(sums[1::2]).tolist()
        if not any(counts):
            warnings.warn(
                "settling recorded no token since the last step, because no forward ran in training mode; call "
                "model.train() before the training forwards",
                stacklevel=3,
            )
        for layer, statistics, total, count in zip(layers, seen, sums[::2], counts, strict=True):
            if count:
                logits = layer.logits_of(name)
                old = torch.softmax(logits.double(), 0)
                mean = torch.lerp(old, (total / count).to(old.device), 1 / min(age, window))
                logits.copy_(mean.clamp(min=TINY).log())
            statistics.reset()


def check_fractions(start: float, end: float) -> None:
    """Check the interval of training in which the routing settles.

    Raises:
        LilyError: unless 0 <= start < end < 1.
    """
    if not 0 <= start < end < 1:
        raise LilyError(f"settle start={start:g}, end={end:g}: expected fractions of training, 0 <= start < end < 1")


class SettleCallback(TrainerCallback):  # type: ignore[misc]
    """Settles the adapter of a `Trainer` (transformers', TRL's): `Trainer(..., callbacks=[lily.SettleCallback()])`.

    Supports gradient accumulation, several processes and resuming. Checkpoints written between `start` and `end` load
    with their share of static weights; the model after training, and every checkpoint after `end`, is a plain static
    adapter.

    Args:
        start: fraction of training up to which the routing is unchanged.
        end: fraction of training after which it is static.
        adapter: default: the active one.
    """

    def __init__(self, start: float = 0.6, end: float = 0.8, adapter: str | None = None) -> None:
        check_fractions(start, end)
        self.start, self.end, self.adapter = start, end, adapter
        self.settling: Settling | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Add the static weights before the trainer creates its optimizer."""
        self.settling = Settling(kw["model"], 0, self.start, self.end, self.adapter)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Check that nothing will undo settling.

        Raises:
            LilyError: if the optimizer does not contain the static vectors, or a checkpoint from before they were used
                could be loaded at the end.
        """
        optimizer = kw["optimizer"]
        if args.load_best_model_at_end:
            raise LilyError(
                "load_best_model_at_end=True could bring back a checkpoint from before the routing settled; set it to "
                "False and choose among the checkpoints after `end`"
            )
        if self.settling is None:
            self.settling = Settling(kw["model"], 0, self.start, self.end, self.adapter)
        self.settling.total_steps = state.max_steps
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
        if any(id(p) not in trained for p in self.settling.logits):
            raise LilyError(
                "the optimizer was created before the adapter got its static weights; let the Trainer create it, or "
                "use LilyConfig(settled=0.0), which creates them with the adapter"
            )
        self.settling.step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Interpolate for the next step, before a checkpoint of this one is written."""
        assert self.settling is not None
        self.settling.step(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Convert to a plain static adapter, if training reached `end`."""
        assert self.settling is not None
        if self.settling.adapted.config.settled == 1:
            self.settling.finish()
            self.settling = None  # another training starts with a static adapter and is refused
