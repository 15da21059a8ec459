"""Further test sets of a recipe, evaluated separately: the paper trains on one mix and tests on eight sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lily.recipes.scoring.metrics import shown
from lily.recipes.spec.schema import MEAN

# Set -> when ("before", "final") -> metric -> value
Figures = dict[str, dict[str, dict[str, float]]]


def noted(results: Mapping[str, Mapping[str, float]], when: str, earlier: Figures | None = None) -> Figures:
    """Metrics by set, with their unweighted mean, under the key `when` (before or final), merged into `earlier`."""
    if not results:
        return {}
    names = next(iter(results.values()))
    mean = {metric: float(np.mean([values[metric] for values in results.values()])) for metric in names}
    previous = earlier or {}
    return {name: {**previous.get(name, {}), when: dict(values)} for name, values in {**results, MEAN: mean}.items()}


def tabled(figures: Figures, metrics: Sequence[str], counts: Mapping[str, int]) -> list[list[str]]:
    """A header and a line for each set: its rows, and each metric before and after training; the mean comes last."""
    lines = [["untrained → trained", "rows", *metrics]]
    for name, values_of in figures.items():
        values = [" → ".join(shown(m, values_of[when].get(m)) for when in ("before", "final")) for m in metrics]
        lines.append([name, "" if name == MEAN else f"{counts[name]:,}", *values])
    return lines
