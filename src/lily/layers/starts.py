"""How A starts: Kaiming-uniform, as orthonormal rows, or as the main directions of the inputs that it projects.

In each of them an input without preferred direction, or for the last one the data, gives h the same variance, so that
a learning rate suits all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Squared norm of a row of A under Kaiming-uniform with a = sqrt(5): `in` entries of variance 1 / (3 in).
ROW_ENERGY = 1 / 3

# Directions that `TopDirections` keeps beyond those asked for: 2 * rank + KEPT.
KEPT = 16

# A singular value below this share of the largest one is rounding.
NEGLIGIBLE = 1e-5


def kaiming(weight: Tensor) -> Tensor:
    """Fill A as `nn.Linear` and LoRA do."""
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


@torch.no_grad()
def orthonormal(weight: Tensor, rank: int) -> Tensor:
    """Fill each `rank` rows of A with orthogonal rows of norm `sqrt(ROW_ENERGY)`.

    More rows than columns are blocks of orthogonal rows, as many as there are columns in each.
    """
    for A in torch.split(weight, rank):
        for block in torch.split(A, A.shape[1]):
            exact = torch.empty(block.shape, dtype=torch.float32, device=block.device)  # half precision has no QR
            block.copy_(nn.init.orthogonal_(exact, gain=math.sqrt(ROW_ENERGY)))
    return weight


def completed(rows: Tensor, others: Tensor) -> Tensor:
    """Orthonormal `rows` (k, in), followed by as many orthonormal ones as `others` (n, in) has, made from these.

    As far as `in` allows, they are orthogonal to `rows`; what is beyond it is in blocks as in `orthonormal`.
    """
    room = rows.shape[1] - rows.shape[0]
    # The Q of a QR is orthonormal even where `others` depend on `rows`.
    more = _basis(torch.cat((rows, others[:room])))[len(rows) :]
    return torch.cat((rows, more, *map(_basis, torch.split(others[room:], rows.shape[1]))))


def _basis(rows: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(rows.T)[0]
    return columns.T


class TopDirections:
    """The top right singular vectors of vectors that arrive in batches: an incremental SVD in little memory.

    It keeps `2 * rank + KEPT` directions with their singular values, stacks the next batch below them and decomposes
    again. Nothing is subtracted from the vectors: A multiplies them as they are, without a bias.

    Args:
        rank: how many are asked for.
        columns: length of the vectors.

    Attributes:
        kept: (kept directions, columns), each direction times its singular value.
        energy: sum of the squares of all vectors.
        count: number of vectors.
        converged: whether the last batch did not turn the top directions.
    """

    def __init__(self, rank: int, columns: int) -> None:
        self.rank = min(rank, columns)
        self.kept = torch.zeros(min(columns, 2 * rank + KEPT), columns)
        self.before = self.kept[: self.rank]
        self.energy, self.count, self.converged = 0.0, 0, False

    def add(self, vectors: Tensor) -> None:
        """Take in vectors (n, columns)."""
        vectors = vectors.float()
        self.energy += float(vectors.square().sum(dtype=torch.float64 if vectors.device.type != "mps" else None))
        self.count += len(vectors)
        self.stack(vectors)

    def stack(self, rows: Tensor) -> None:
        """Decompose again with more rows, which need not be vectors: `kept` of another process gives its share."""
        keep = len(self.kept)
        S, Vh = _svd(torch.cat((self.kept.to(rows.device), rows)), keep)
        # LAPACK leaves the sign open; fixed, so that every machine has the same
        signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
        self.kept = torch.zeros(keep, rows.shape[1], device=rows.device)
        self.kept[: len(S)] = S.unsqueeze(1) * signs * Vh

    def end_batch(self, similarity: float) -> None:
        """Compare the directions with those before the batch: converged if the cosine of each is large enough."""
        now = self.kept[: self.rank]
        cosines = torch.cosine_similarity(now, self.before.to(now.device))
        there = now.norm(dim=1) > NEGLIGIBLE * self.kept[0].norm()
        self.converged = bool(there.any()) and bool((cosines[there] >= similarity).all())
        self.before = now

    def top(self, rank: int, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Up to `rank` directions (k, columns), orthonormal, and their singular values (k,).

        Args:
            rank: how many; fewer if the vectors have no more.
            without: orthonormal rows (n, columns) whose span is removed from the vectors first.
        """
        rows = self.kept if without is None else self.kept - self.kept @ without.T @ without
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        k = min(rank, int(S.gt(NEGLIGIBLE * self.kept[0].norm()).sum()))
        signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
        return (signs * Vh)[:k], S[:k]


def _svd(rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` largest singular values and right singular vectors; a randomized SVD, as in PEFT's EVA, if large."""
    if min(rows.shape) <= 4 * keep:
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        return S[:keep], Vh[:keep]
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        torch.manual_seed(0)
        _, S, V = torch.svd_lowrank(rows, q=min(2 * keep, *rows.shape), niter=4)
    return S[:keep], V.mT[:keep]
