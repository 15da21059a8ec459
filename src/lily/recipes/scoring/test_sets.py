"""Further test sets of a recipe, each judged by itself: the paper trains on one mix and tests on eight sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lily.recipes.data.tables import Row
from lily.recipes.scoring.metrics import shown
from lily.recipes.spec.schema import MEAN

# Set -> when ("before", "final") -> metric -> value
Figures = dict[str, dict[str, dict[str, float]]]


def judged(
    judge: Callable[[Any, Sequence[Row]], dict[str, float]],
    model: Any,
    sets: Mapping[str, Sequence[Row]],
    when: str,
    earlier: Figures | None = None,
) -> Figures:
    """The figures of every set, and their mean, under the key `when`, added to those of `earlier`.

    Args:
        judge: metrics of a model on rows.
        model: what is judged.
        sets: name -> rows.
        when: before or final.
        earlier: found before.
    """
    return noted({name: judge(model, rows) for name, rows in sets.items()}, when, earlier)


def noted(found: Mapping[str, Mapping[str, float]], when: str, earlier: Figures | None = None) -> Figures:
    """Metrics by set, with their unweighted mean, under the key `when`, added to those of `earlier`."""
    if not found:
        return {}
    names = next(iter(found.values()))
    mean = {metric: float(np.mean([values[metric] for values in found.values()])) for metric in names}
    known = earlier or {}
    return {name: {**known.get(name, {}), when: dict(values)} for name, values in {**found, MEAN: mean}.items()}


def tabled(figures: Figures, metrics: Sequence[str], counts: Mapping[str, int]) -> list[list[str]]:
    """A header and a line for each set: its rows, and each metric before and after training; the mean comes last.

    Args:
        figures: what was found.
        metrics: which to show, in order.
        counts: rows of each set.
    """
    lines = [["untrained → trained", "rows", *metrics]]
    for name, found in figures.items():
        values = [" → ".join(shown(m, found[when].get(m)) for when in ("before", "final")) for m in metrics]
        lines.append([name, "" if name == MEAN else f"{counts[name]:,}", *values])
    return lines
