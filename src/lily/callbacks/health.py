"""Training health: stop at a loss, gradient or weight that is not finite; warn of routers that stop routing.

A run with a loss that is not finite cannot recover and would overwrite good checkpoints, so it is stopped before the
optimizer's step. Routers that stop routing (`router_watch`) and adapted layers without a gradient (`gradient_watch`)
are reported; training continues.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lily.callbacks.gradient_watch import IdleWatch
from lily.callbacks.router_watch import RouterWatch
from lily.errors import DivergedError
from lily.io.words import some
from lily.plan.wrappers import plain_name

# float16: consecutive steps that may overflow. Some do while the gradient scaler searches for its scale.
OVERFLOWS = 50


def last_checkpoint(folder: str) -> Path | None:
    """The newest `checkpoint-STEP` in a Trainer's output folder."""
    steps = {int(m[1]): p for p in Path(folder).glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    return steps[max(steps)] if steps else None


class HealthCallback(TrainerCallback):  # type: ignore[misc]
    """Checks a training with `Trainer` (transformers', TRL's): `Trainer(..., callbacks=[lily.HealthCallback()])`.

    A gradient that is not finite stops training before the optimizer's step, and a weight that is not before it is
    saved, by a `DivergedError` that names the step, the tensors and the last good checkpoint. Under float16 single
    overflows are left to the gradient scaler. `logging_nan_inf_filter`, which hides losses that are not finite from the
    log, is switched off. Routers are sampled in some steps; persistent problems are reported once, and so are adapted
    layers that receive no gradient in the first steps. Costs one device synchronization per step. The checks for finite
    values work on models without Lily too.

    Args:
        announce: called with the reports on routers and layers; default: a warning.
    """

    def __init__(self, announce: Callable[[str], Any] | None = None) -> None:
        announce = announce or (lambda report: warnings.warn(report, stacklevel=2))
        self.routers, self.idle = RouterWatch(announce), IdleWatch(announce)
        self._loss: Tensor | None = None
        self._overflows = 0

    def note_loss(self, loss: Tensor) -> None:
        """Check a micro-batch's loss together with the gradient of its step; `Trainer` passes no loss to callbacks."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss.to(self._loss.device)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Log losses that are not finite, too."""
        args.logging_nan_inf_filter = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Record the routing in some steps."""
        if state.is_world_process_zero and self.routers.wants(state.global_step, state.max_steps):
            self.routers.attach(kw["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Check the gradient of a step before the optimizer uses it.

        Raises:
            DivergedError: if loss or gradient are not finite.
        """
        model, optimizer = kw.get("model"), kw["optimizer"]
        self.routers.collect(state.global_step + 1)
        if self.idle.wanted and state.is_world_process_zero and model is not None:
            self.idle.look(model, _parameters(optimizer), last=state.global_step + 1 >= state.max_steps)
        loss, self._loss = self._loss, None
        gradients = {p: _local(p.grad) for p in _parameters(optimizer) if p.grad is not None}
        if _finite([*gradients.values(), *([] if loss is None else [loss])], args):
            self._overflows = 0
            return
        if loss is not None and not math.isfinite(float(loss)):
            what = f"the loss is {float(loss):g}"
        elif args.fp16:
            self._overflows += 1
            if self._overflows < OVERFLOWS:
                return
            what = f"the gradient has overflowed in {OVERFLOWS} steps in a row"
        else:
            what = _which("the gradient", model, gradients)
        raise _diverged(args, state.global_step + 1, what, optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Check the weights before anything is logged, evaluated or saved.

        Raises:
            DivergedError: if a weight is not finite.
        """
        if control.should_log or control.should_evaluate or control.should_save:
            self.check_weights(args, state, kw["model"], kw["optimizer"])

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Check the weights before an epoch's result is evaluated or saved.

        Raises:
            DivergedError: if a weight is not finite.
        """
        self.check_weights(args, state, kw["model"], kw["optimizer"])

    def check_weights(self, args: TrainingArguments, state: TrainerState, model: Any, optimizer: Any) -> None:
        """Stop if a weight is not finite.

        Raises:
            DivergedError: names the step, the tensors and the last checkpoint.
        """
        weights = {p: _local(p.detach()) for p in _parameters(optimizer)}
        if not _finite(list(weights.values()), args):
            raise _diverged(args, state.global_step, _which("the weight", model, weights), optimizer)


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _finite(tensors: Sequence[Tensor], args: TrainingArguments) -> bool:
    """Whether all values are finite, on all processes; one reduction and one device synchronization."""
    norm = get_total_norm(tensors)
    # a norm may overflow although all values are finite
    finite = bool(torch.isfinite(norm)) or all(bool(torch.isfinite(t).all()) for t in tensors)
    if dist.is_available() and dist.is_initialized():
        everywhere = torch.tensor(int(finite), device=args.device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        finite = bool(everywhere)
    return finite


def _which(what: str, model: Any, tensors: Mapping[nn.Parameter, Tensor]) -> str:
    plain = plain_name(model)
    names = {p: plain(name) for name, p in model.named_parameters()}
    bad = [names.get(p, "a parameter") for p, t in tensors.items() if not torch.isfinite(t).all()]
    if not bad:
        return f"{what} in another process is not finite"
    return f"{what} of {some(bad)} is not finite"


def _diverged(args: TrainingArguments, step: int, what: str, optimizer: Any) -> DivergedError:
    """The error for `what`, such as `the loss is nan`, in an optimizer step."""
    rate = max(float(group["lr"]) for group in optimizer.param_groups)
    advice = (
        "lower the learning rate or scaling, or train in float32 (or bfloat16) if this was float16"
        if step > 1
        else "nothing was learned yet, so check the base model's weights, its precision and the data"
    )
    last = last_checkpoint(args.output_dir)
    checkpoint = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return DivergedError(
        f"step {step}: {what} (learning rate {rate:g}); {advice}. This step was not saved; {checkpoint}"
    )
