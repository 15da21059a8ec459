"""Statistics of routing, accumulated in one pass without storing tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lily import functional

TINY = 1e-30  # weight of an expert that no token chose; its logit stays finite
# An expert is dead if its mean weight is below this part of an equal one. Its gradient is proportional to its weight,
# so it learns a hundred times slower than under equal weights; a larger bound would count experts for rare tokens.
DEAD_EXPERT = 0.01


def per_token(w: Tensor, h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Expand the weights of a forward to every token, in float64.

    Args:
        w: the weights used: (E,), (batch, 1, E) or (..., E).
        h: (..., r); its leading dimensions are the tokens.
        mask: (batch, tokens), nonzero where a token counts, or of samples in a row as for `functional.pool`; None: all
            do.

    Returns:
        Weights (..., E) and counts (...), 1 where a token counts and else 0, with h's leading dimensions.
    """
    w = w.detach().double().expand(*h.shape[:-1], -1)
    counts = w.new_ones(h.shape[:-1])
    if mask is not None:
        m = (mask.any(-1) if functional.is_of_samples(mask, h) else mask != 0).double()
        m = m.reshape(-1) if h.ndim == 2 else m.reshape(*m.shape, *([1] * (h.ndim - 1 - m.ndim)))
        counts = counts * m
    return w, counts


@dataclass
class RoutingStatistics:
    """Sums over tokens of the expert weights that a layer used, in float64.

    Attributes:
        total: sum of the weights, (E,).
        square: sum of their squares, (E,).
        count: tokens seen.
        training_only: ignore forward passes made in eval mode.
        per_token: record the softmax weights of each token, before the routing pools them.
    """

    total: Tensor
    square: Tensor
    count: Tensor
    training_only: bool = False
    per_token: bool = False

    @classmethod
    def empty(cls, experts: int, training_only: bool = False, per_token: bool = False) -> RoutingStatistics:
        """Statistics of zero tokens."""
        total, square, count = (torch.zeros(n, dtype=torch.float64) for n in (experts, experts, 1))
        return cls(total, square, count, training_only, per_token)

    def wants(self, training: bool) -> bool:
        """Whether a forward in that mode counts."""
        return training or not self.training_only

    def add(self, w: Tensor, h: Tensor, mask: Tensor | None) -> None:
        """Add one forward; see `per_token` for the arguments."""
        with torch.no_grad():
            w, counts = per_token(w, h, mask)
            weighted = (w * counts.unsqueeze(-1)).flatten(0, -2)
            if self.count.device != w.device:
                self.total, self.square, self.count = (t.to(w.device) for t in (self.total, self.square, self.count))
            self.total += weighted.sum(0)
            self.square += (weighted * w.flatten(0, -2)).sum(0)
            self.count += counts.sum()

    def reset(self) -> None:
        """Set all sums to zero."""
        for sums in (self.total, self.square, self.count):
            sums.zero_()

    @property
    def mean(self) -> Tensor:
        """Mean weights, (E,); uniform without tokens."""
        if not self.count.item():
            return torch.full_like(self.total, 1 / self.total.numel())
        return self.total / self.count

    @property
    def variance(self) -> float:
        """Variance of the weight vector over the tokens, summed over experts; 0 if independent of the data."""
        if not self.count.item():
            return 0.0
        return float((self.square / self.count - self.mean.square()).clamp(min=0).sum())


def all_reduce(statistics: RoutingStatistics) -> None:
    """Sum the statistics over all processes of a distributed run; without one, do nothing."""
    if dist.is_available() and dist.is_initialized():
        packed = torch.cat([statistics.total, statistics.square, statistics.count])
        dist.all_reduce(packed)
        experts = statistics.total.numel()
        statistics.total, statistics.square = packed[:experts], packed[experts:-1]
        statistics.count = packed[-1:]
