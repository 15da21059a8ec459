"""One layer of an exported LoRA: its matrices, at the adapter's rank or a smaller one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lily.layers.merging import Factors


@dataclass(frozen=True)
class Layer:
    """One layer of an exported LoRA.

    Attributes:
        A: (rank, in), or (experts, rank, in).
        B: (out, rank), or (experts, out, rank). A and B of a convolution with groups are block diagonal.
        scale: factor that the reader applies, alpha / rank.
        energy: kept share of the update's squared norm (for stacked experts, the smallest); 1: exact.
    """

    A: Tensor
    B: Tensor
    scale: float
    energy: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.A.shape[-2]


def cut(f: Factors, rank: int | None, conv_groups: int = 1) -> Layer:
    """A layer's update, exact or at a smaller rank by a truncated SVD of its two thin factors."""
    if conv_groups > 1:
        each = cut(f, None if rank is None else rank // conv_groups)
        A, B = (torch.block_diag(*t) for t in (each.A, each.B))  # type: ignore[no-untyped-call]
        return replace(each, A=A, B=B)
    r = f.A.shape[-2]
    if rank is None or rank >= r:
        return Layer(f.A, f.B.mT, f.scaling)
    q_in, r_in = torch.linalg.qr(f.A.mT.double())  # (..., in, r)
    q_out, r_out = torch.linalg.qr(f.B.mT.double())  # (..., out, r)
    u, s, v = torch.linalg.svd(r_out @ r_in.mT, full_matrices=False)
    total, kept = s.square().sum(-1), s[..., :rank].square().sum(-1)
    energy = float(torch.where(total > 0, kept / total, 1.0).min())
    root = s[..., :rank].sqrt()
    A = (q_in @ (v[..., :rank, :].mT * root.unsqueeze(-2))).mT
    B = q_out @ (u[..., :rank] * root.unsqueeze(-2))
    return Layer(A.to(f.A.dtype), B.to(f.B.dtype), f.scaling, energy)


def finished(layer: Layer, rank: int, dtype: torch.dtype | None, uniform: bool) -> Layer:
    """Pad with zeros to `rank`; keep the scaling if alpha is then an integer, else multiply it into B."""
    missing = rank - layer.rank
    A, B = nn.functional.pad(layer.A, (0, 0, 0, missing)), nn.functional.pad(layer.B, (0, missing))
    scale = layer.scale
    if uniform or not (scale * rank).is_integer() or scale <= 0:
        B, scale = B * scale, 1.0
    return Layer(A.to("cpu", dtype), B.to("cpu", dtype), scale, layer.energy)
