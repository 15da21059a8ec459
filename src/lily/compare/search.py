"""Which learning rate and scale a contestant is compared at: the same search for everybody, on validation rows.

First the learning rate, at the recipe's scale: half, once and twice the recipe's, and further in the direction that is
better for as long as the best one is at the end of what was tried. Then the scale, at the best learning rate, in the
same way. So nobody is held to a default that suits another method, nor to the edge of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

FACTOR = 2.0
FIRST = (0, -1, 1)  # powers of the factor, that every search begins with
MOST = 5  # powers of the factor, in either direction

# (power of the learning rate, power of the scale)
Point = tuple[int, int]
Found = Mapping[Point, float | None]
Better = Callable[[float, float], bool]


def next_points(found: Found, better: Better, scaled: bool) -> list[Point]:
    """What to try next; nothing when the search has ended.

    Args:
        found: point -> the metric on the validation rows; None: the run failed, as one that diverges does.
        better: whether its first argument is the better value.
        scaled: whether there is a scale to choose.
    """
    rates = {rate: value for (rate, scale), value in found.items() if scale == 0}
    if more := _next(rates, better):
        return [(rate, 0) for rate in more]
    rate = _best(rates, better)
    if not scaled or rate is None:
        return []
    return [(rate, scale) for scale in _next({s: v for (r, s), v in found.items() if r == rate}, better)]


def chosen(found: Found, better: Better) -> Point | None:
    """The best point; of equals the one nearest to the recipe's own. None: all failed."""
    best: Point | None = None
    for point in sorted(found, key=lambda p: (abs(p[0]) + abs(p[1]), p)):
        value, known = found[point], None if best is None else found[best]
        if value is not None and (known is None or better(value, known)):
            best = point
    return best


def _best(found: Mapping[int, float | None], better: Better) -> int | None:
    point = chosen({(power, 0): value for power, value in found.items()}, better)
    return None if point is None else point[0]


def _next(found: Mapping[int, float | None], better: Better) -> list[int]:
    if first := [power for power in FIRST if power not in found]:
        return first
    best = _best(found, better)
    if best is None:  # everything diverged: go down
        return [min(found) - 1] if min(found) > -MOST else []
    for edge, step in ((min(found), -1), (max(found), 1)):
        if best == edge and abs(edge) < MOST:
            return [edge + step]
    return []
