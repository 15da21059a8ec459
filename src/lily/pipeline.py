"""Pipeline stages in processes of their own: each has the bank, and their gradients of it are summed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from lily.bank import LilyBank
from lily.errors import LilyError


@torch.no_grad()
def sum_bank_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every pipeline stage the whole gradient of the tensors that layers of several stages share.

    With `torch.distributed.pipelining` each process holds some of the layers. The bank's tensors serve all of them, so
    every process has them all, and computes the part of their gradient that its own layers make. Called after the
    schedule's backward, before clipping and the optimiser's step, this sums the parts; the copies, equal at first, then
    stay equal. A router belongs to one layer, hence to one stage, and needs nothing.

    Args:
        model: holds the bank; layers of other stages may be gone.
        group: the processes that hold the stages of one pipeline; default: all.

    Raises:
        LilyError: if there is no bank in the model.
    """
    bank = next((m for m in model.modules() if isinstance(m, LilyBank)), None)
    if bank is None:
        raise LilyError(f"this {type(model).__name__} holds no lily_bank; give each stage the adapted model's own")
    for shared in bank.parameters():
        if shared.requires_grad:
            if shared.grad is None:  # no layer of this stage uses it
                shared.grad = torch.zeros_like(shared)
            dist.all_reduce(shared.grad, group=group)
