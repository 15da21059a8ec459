"""Which learning rate and scale a method is compared at: the same search for all methods, on validation rows.

First the learning rate, at the recipe's scale: half, once and twice the recipe's, and further in the better direction
while the best one is at an end of what was tried. Then the scale, at the best learning rate, in the same way. So no
method is compared at a default that suits another one, nor at the edge of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping

from lily.search.engine import ranked

FACTOR = 2.0
FIRST = (0, -1, 1)  # powers of the factor that every search begins with
MOST = 5  # largest power of the factor, in either direction

# (power of the factor for the learning rate, power for the scale)
Powers = tuple[int, int]


def next_powers(values: Mapping[Powers, float | None], metric: str, scaled: bool) -> list[Powers]:
    """What to try next; empty when the search has ended.

    Args:
        values: powers -> the metric on the validation rows; None: the run failed, as one that diverges does.
        metric: its name.
        scaled: whether the method has a scale to choose.
    """
    rates = {rate: value for (rate, scale), value in values.items() if scale == 0}
    if more := _next(rates, metric):
        return [(rate, 0) for rate in more]
    rate = _best(rates, metric)
    if not scaled or rate is None:
        return []
    return [(rate, scale) for scale in _next({s: v for (r, s), v in values.items() if r == rate}, metric)]


def best_powers(values: Mapping[Powers, float | None], metric: str) -> Powers | None:
    """The best of them; of equal ones the nearest to the recipe's values. None: all failed."""
    nearest_first = sorted(values, key=lambda powers: (abs(powers[0]) + abs(powers[1]), powers))
    return next(iter(ranked({powers: values[powers] for powers in nearest_first}, metric)), None)


def _best(values: Mapping[int, float | None], metric: str) -> int | None:
    powers = best_powers({(power, 0): value for power, value in values.items()}, metric)
    return None if powers is None else powers[0]


def _next(values: Mapping[int, float | None], metric: str) -> list[int]:
    if first := [power for power in FIRST if power not in values]:
        return first
    best = _best(values, metric)
    if best is None:  # all diverged: try lower ones
        return [min(values) - 1] if min(values) > -MOST else []
    for edge, step in ((min(values), -1), (max(values), 1)):
        if best == edge and abs(edge) < MOST:
            return [edge + step]
    return []
