"""Add an update to a weight so that it can be removed again bit-exactly.

Adding an update rounds, and subtracting it rounds again, so a weight that is merged and unmerged at every step of a
reinforcement-learning run drifts. The few entries that subtraction does not restore are stored, so unmerging restores
every bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Undo:
    """The entries that subtraction does not restore.

    Attributes:
        where: flat positions; None if the whole weight is stored because most entries differ.
        values: the weight's values there.
        checksum: of the weight's bits, to detect an update that is not reproduced exactly; if the whole weight is
            stored, of the merged weight's bits, to detect that it changed.
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
    """Like `add`, and also return what undoes it exactly."""
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
    """Remove the update.

    Args:
        merged: what `fold` returned.
        delta: the same update.
        undo: what `fold` returned with it.

    Returns:
        The weight, and whether it equals the original bit for bit; it does, unless `merged` or `delta` changed.
    """
    if undo.where is None and _checksum(merged) == undo.checksum:
        return undo.values.to(merged.device), True
    weight = _subtracted(merged, delta)
    if undo.where is None:  # changed since the merge: the stored weight would lose that change
        return weight, False
    weight.view(-1)[undo.where.to(weight.device).long()] = undo.values.to(weight.device)
    return weight, _checksum(weight) == undo.checksum


def _subtracted(merged: Tensor, delta: Tensor) -> Tensor:
    return (merged.to(delta.dtype) - delta).to(merged.dtype).contiguous()


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.element_size()])


def _checksum(x: Tensor) -> int:
    return int(_bits(x).sum(dtype=torch.int64))
