"""Successive halving: all begin, and at each rung the better ones go on. Pure functions.

A run that goes on does so from its own checkpoint and under the schedule of the whole run, so the one that wins is the
run that a grid with the same evaluations would have made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Rung:
    """A stage.

    Attributes:
        until: optimiser steps at which it ends; None: the end of training.
        keep: how many go on.
    """

    until: int | None
    keep: int


def rungs(count: int, steps: int, factor: int = 2, survivors: int = 2) -> tuple[Rung, ...]:
    """The stages of a halving; a single one, to the end, where there is nothing to halve.

    Args:
        count: of those that begin.
        steps: of a whole run.
        factor: one in so many goes on.
        survivors: at least so many reach the end.
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


def survivors(values: Mapping[T, float | None], keep: int, better: Callable[[float, float], bool]) -> list[T]:
    """Those that go on, in the order in which they were given.

    Args:
        values: what each has reached; None: it failed, and does not go on. Of equals the earlier one goes on.
        keep: how many.
        better: whether its first argument is the better value.
    """
    placed: list[T] = []
    for one, value in values.items():
        if value is None:
            continue
        at = next((i for i, other in enumerate(placed) if better(value, values[other])), len(placed))  # type: ignore[arg-type]
        placed.insert(at, one)
    going = placed[:keep]
    return [one for one in values if one in going]
