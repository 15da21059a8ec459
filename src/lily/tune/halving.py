"""The grid of `lily sweep` with successive halving: all entrants begin, and after each rung the better ones continue.

A run continues from its own checkpoint and under the schedule of the whole run, so the winner is the run that a full
grid with the same evaluations would have trained.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lily.search.engine import ranked

Entrant = TypeVar("Entrant", bound=Hashable)


@dataclass(frozen=True)
class Rung:
    """A stage."""

    until: int | None  # optimizer steps at which it ends; None: the end of training
    keep: int  # number of runs that continue after it


def rungs(count: int, steps: int, factor: int = 2, survivors: int = 2) -> tuple[Rung, ...]:
    """The stages of a halving; a single one, to the end, where there is nothing to halve.

    Args:
        count: runs that begin.
        steps: optimizer steps of a whole run.
        factor: one in `factor` runs continues.
        survivors: least number of runs that reach the end.
    """
    kept = []
    while count > survivors:
        count = max(survivors, math.ceil(count / factor))
        kept.append(count)
    stages: list[Rung] = []
    for i, keep in enumerate(kept):
        until = math.ceil(steps / factor ** (len(kept) - i))
        if until < steps and not (stages and stages[-1].until == until):
            stages.append(Rung(until, keep))
    return (*stages, Rung(None, count))


def next_runs(
    values: Mapping[tuple[int, Entrant], float | None], stages: Sequence[Rung], entrants: Sequence[Entrant], metric: str
) -> list[tuple[int, Entrant]]:
    """The runs of the next rung, as (index of the rung, entrant) in the order of the entrants; empty after the last.

    Args:
        values: results so far; None: the run failed, and does not continue. Of equal ones the earlier continues.
        stages: from `rungs`.
        entrants: of the first rung.
        metric: of the values.
    """
    index = max((done for done, _ in values), default=-1) + 1
    if index == len(stages):
        return []
    if index:
        before = {one: value for (done, one), value in values.items() if done == index - 1}
        better = ranked(before, metric)[: stages[index - 1].keep]
        entrants = [one for one in entrants if one in better]
    return [(index, one) for one in entrants]
