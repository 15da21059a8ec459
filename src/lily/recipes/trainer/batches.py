"""Which rows a step trains on, independent of the number of processes.

The recipe's batch is split among the processes. Its rows follow from the seed and the epoch alone (not from random
numbers that dropout has used up, which differ between processes and after a resume), and the last batch of an epoch
stays small: no row is repeated to make the parts equal.

accelerate's `split_batches` with `even_batches=False` gives other figures: a process without rows in the last batch
gets no batch, so the others wait for it in that step, and unequal parts get no weight. `use_seedable_sampler` replaces
a RandomSampler only, so grouping by length would draw from the global random generator.
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
    """Batches of row numbers, for all processes together.

    Args:
        rows: number of rows.
        size: rows in a batch.
        seed: determines the order together with the epoch.
        lengths: tokens of each row, to batch rows of similar length; None: shuffle only.
        group: number of rows that should have similar lengths; a multiple of `size`.
    """

    def __init__(
        self, rows: int, size: int, seed: int, lengths: Sequence[int] | None = None, group: int | None = None
    ) -> None:
        self.rows, self.size, self.seed, self.lengths, self.group = rows, size, seed, lengths, group or size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has a different order."""
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
    """Collates one process's part of a batch.

    Attributes:
        rows: the encoded examples, by number.
        process: index of this one of the `processes`.
    """

    rows: Any
    collate: Callable[[list[Any]], dict[str, Any]]
    process: int
    processes: int

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        """The model's inputs and, with several processes, `SHARE`.

        A process that the batch has no row for gets one with weight 0, since all must take part in each step.
        """
        mine = numbers[self.process :: self.processes]
        batch = dict(self.collate([self.rows[i] for i in mine or numbers[:1]]))
        if not mine and batch["labels"].ndim > 1:  # labels of tokens: the loss is over the unmasked ones
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        if self.processes > 1:
            batch[SHARE] = torch.tensor([len(mine), len(numbers)])
        return batch


def weight_of(share: Tensor, processes: int) -> Tensor:
    """Weight of a part's mean loss, so that the mean over processes is the mean over the batch's rows."""
    weight: Tensor = share[0] * processes / share[1]
    return weight
