"""The loop and the ranking of every search.

A search space is a function from the values measured so far to the trials to run next. It has no other state, so an
interrupted search is resumed by calling the same function again: trials that were recorded are read, not repeated.
The spaces are `lily.tune.study` (Optuna's TPE), `lily.tune.halving` (a grid) and `lily.compare.doubling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from lily.recipes.scoring.metrics import LOWER_IS_BETTER

Trial = TypeVar("Trial", bound=Hashable)


def search(
    propose: Callable[[Mapping[Trial, float | None]], Sequence[Trial]],
    run: Callable[[Sequence[Trial]], Mapping[Trial, float | None]],
) -> dict[Trial, float | None]:
    """Run what a space proposes until it proposes nothing.

    Args:
        propose: values so far -> trials of the next round.
        run: trains a round, or reads what is recorded; returns the main metric on the validation rows of each trial,
            None where a trial failed.

    Returns:
        The values of all trials, in the order in which they were proposed.
    """
    values: dict[Trial, float | None] = {}
    while trials := propose(values):
        values |= run(trials)
    return values


def ranked(values: Mapping[Trial, float | None], metric: str) -> list[Trial]:
    """The trials with a finite value, from best to worst; of equal ones the earlier first."""
    sign = 1.0 if metric in LOWER_IS_BETTER else -1.0
    finite = {trial: value for trial, value in values.items() if value is not None and math.isfinite(value)}
    return sorted(finite, key=lambda trial: sign * finite[trial])
