"""Folding an update into a weight so that it can be taken out again without a trace.

Adding an update rounds, and subtracting it again rounds once more, so a weight that is merged and unmerged at every
step of a reinforcement-learning run drifts. Here the few entries that subtraction would not bring back are kept, so
unmerging restores every bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Undo:
    """What subtraction alone would get wrong.

    Attributes:
        where: flat positions; None where most of the weight is kept, which is then all of it.
        values: the weight's own values there.
        checksum: of the weight's bits, to notice an update that is not reproduced exactly; where all of the weight is
            kept, of the merged weight's, to notice that it changed.
    """

    where: Tensor | None
    values: Tensor
    checksum: int


def add(weight: Tensor, delta: Tensor) -> tuple[Tensor, float]:
    """Add an update to a weight, in at least float32.

    Args:
        weight: any floating dtype.
        delta: the update, of the same shape, in float32 or wider.

    Returns:
        The merged weight in the weight's dtype, and the share of the update's norm that rounding to that dtype changed
        (0 where that dtype is the update's own).
    """
    exact = weight.to(delta.dtype) + delta
    if weight.dtype == delta.dtype:
        return exact, 0.0
    merged = exact.to(weight.dtype)
    norm = torch.linalg.vector_norm(delta)
    error = torch.linalg.vector_norm(exact.sub_(merged))
    return merged, float(error / norm) if norm > 0 else 0.0


def fold(weight: Tensor, delta: Tensor) -> tuple[Tensor, Undo, float]:
    """Like `add`, and keep what it takes to undo it exactly."""
    merged, error = add(weight, delta)
    back = _subtracted(merged, delta)
    where = (_bits(back) != _bits(weight)).flatten().nonzero().squeeze(1)
    if 2 * where.numel() > weight.numel():
        undo = Undo(None, weight.clone(), _checksum(merged))
    else:
        small = where.to(torch.int32) if weight.numel() < 2**31 else where
        undo = Undo(small, weight.flatten()[where].clone(), _checksum(weight))
    return merged, undo, error


def unfold(merged: Tensor, delta: Tensor, undo: Undo) -> tuple[Tensor, bool]:
    """Take the update out again.

    Args:
        merged: what `fold` returned.
        delta: the same update.
        undo: what `fold` returned with it.

    Returns:
        The weight, and whether it is the old one to the last bit; it is, unless `merged` or `delta` changed.
    """
    if undo.where is None and _checksum(merged) == undo.checksum:
        return undo.values.to(merged.device), True
    weight = _subtracted(merged, delta)
    if undo.where is None:  # someone else changed it: the kept weight knows nothing of that
        return weight, False
    weight.view(-1)[undo.where.to(weight.device).long()] = undo.values.to(weight.device)
    return weight, _checksum(weight) == undo.checksum


def _subtracted(merged: Tensor, delta: Tensor) -> Tensor:
    return (merged.to(delta.dtype) - delta).to(merged.dtype).contiguous()


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.element_size()])


def _checksum(x: Tensor) -> int:
    return int(_bits(x).sum(dtype=torch.int64))
