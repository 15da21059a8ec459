"""Which rows a step trains on: the same ones, in the same order, however many processes share the work.

A batch of the recipe is a batch over all processes. Its rows follow from the seed and the epoch alone (not from the
random numbers that dropout used up, which differ between processes and after a resume), every process takes its part
of each batch, and the last batch of an epoch is as small as it is: no row is repeated to even the parts out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from lily.recipes.data.tasks import IGNORED

# (rows that this process has, rows of the whole batch)
SHARE = "share"


class Batches(Sampler[list[int]]):
    """Batches of row numbers, those of all processes together.

    Args:
        rows: how many there are.
        size: rows of a batch.
        seed: with the epoch, decides the order.
        lengths: of the rows; given: rows of like length come together. None: any order.
        group: rows that should be of like length; a multiple of `size`.
    """

    def __init__(
        self, rows: int, size: int, seed: int, lengths: Sequence[int] | None = None, group: int | None = None
    ) -> None:
        self.rows, self.size, self.seed, self.lengths, self.group = rows, size, seed, lengths, group or size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            order = torch.randperm(self.rows, generator=generator).tolist()
        else:
            order = get_length_grouped_indices(list(self.lengths), self.group, generator=generator)
        for start in range(0, self.rows, self.size):
            yield order[start : start + self.size]


@dataclass(frozen=True)
class Part:
    """Makes one process's inputs of the row numbers of a whole batch.

    Attributes:
        rows: the encoded examples, by number.
        collate: makes a batch of examples.
        rank: of this process.
        world: number of processes.
    """

    rows: Any
    collate: Callable[[list[Any]], dict[str, Any]]
    rank: int
    world: int

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        """The inputs, and among several processes `SHARE`.

        A process for which the batch has no row is given one all the same, since all must take part in each step;
        it does not count.
        """
        mine = numbers[self.rank :: self.world]
        batch = dict(self.collate([self.rows[i] for i in mine or numbers[:1]]))
        if not mine and batch["labels"].ndim > 1:  # labels of tokens: the loss is over those that have one
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        if self.world > 1:
            batch[SHARE] = torch.tensor([len(mine), len(numbers)])
        return batch


def weight_of(share: Tensor, world: int) -> Tensor:
    """By what to multiply the mean over a part's rows, so that the mean over processes is that over the whole batch."""
    weight: Tensor = share[0] * world / share[1]
    return weight
