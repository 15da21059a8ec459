"""Sums of a layer's expert weights over data, in memory that does not grow with the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lily.layers.routing_statistics import RoutingStatistics, per_token


class Recorder(RoutingStatistics):
    """The sums over a layer's tokens from which `lily.analysis.routing` is computed, in total and per sample.

    Attributes:
        second: sum over tokens of w w^T, (E, E).
        entropy: sum over tokens of the entropy of w in nats.
        by_sample: sums of w over the tokens of each sample, (samples, E).
        tokens: number of counted tokens of each sample, (samples,).
        aligned: whether the leading dimension of every forward was the batch.
    """

    def __init__(self, experts: int) -> None:
        total, square, count = (torch.zeros(n, dtype=torch.float64) for n in (experts, experts, 1))
        super().__init__(total, square, count)
        self.second = torch.zeros(experts, experts, dtype=torch.float64)
        self.entropy = 0.0
        self.by_sample = torch.zeros(0, experts, dtype=torch.float64)
        self.tokens = torch.zeros(0, dtype=torch.float64)
        self.aligned = True
        self._batch = 0

    def begin(self, samples: int) -> None:
        """Prepare for a batch of `samples` samples."""
        self._batch = samples
        self.by_sample = torch.cat([self.by_sample, self.by_sample.new_zeros(samples, self.by_sample.shape[1])])
        self.tokens = torch.cat([self.tokens, self.tokens.new_zeros(samples)])

    def add(self, w: Tensor, h: Tensor, mask: Tensor | None) -> None:
        """Count one forward; see `RoutingStatistics.add`."""
        super().add(w, h, mask)
        w, counts = (t.cpu() for t in per_token(w, h, mask))
        if mask is not None and h.ndim == 2:  # (batch * tokens, r)
            w, counts = w.view(*mask.shape, -1), counts.view(mask.shape)
        flat = w.flatten(0, -2)
        weighted = flat * counts.flatten().unsqueeze(-1)
        self.second += weighted.T @ flat
        self.entropy += float((torch.special.entr(flat).sum(-1) * counts.flatten()).sum())
        if w.shape[0] != self._batch:
            self.aligned = False
            return
        counted = w * counts.unsqueeze(-1)
        self.by_sample[-self._batch :] += counted.flatten(1, -2).sum(1) if w.ndim > 2 else counted
        self.tokens[-self._batch :] += counts.flatten(1).sum(1) if counts.ndim > 1 else counts
