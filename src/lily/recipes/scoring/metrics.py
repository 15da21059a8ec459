"""Metrics by name, computed by scikit-learn and scipy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lily.recipes.spec.schema import Metric, Recipe

DEFAULTS: dict[str, list[Metric]] = {
    "text-classification": ["accuracy"],
    "image-classification": ["accuracy"],
    "text-regression": ["pearson", "spearman"],
    "sft": ["loss", "perplexity"],
}
SHARES = ("exact_match", "accuracy", "accuracy_norm")  # of rows that are right, so the number of rows tells their noise
SCORED = SHARES  # of sft, besides those computed from the loss
OF_NUMBERS = ("pearson", "spearman", "mse")  # of a regression
LOWER_IS_BETTER = ("loss", "perplexity", "mse")


def metrics_of(recipe: Recipe) -> list[Metric]:
    """The recipe's metrics, or its task's; the first one selects the best checkpoint."""
    return list(recipe.metrics) or DEFAULTS[recipe.task]


def better(metric: str, a: float, b: float) -> bool:
    """Whether the value `a` is better than `b`. NaN is worse than anything else."""
    if math.isnan(b):
        return not math.isnan(a)
    return (a < b) if metric in LOWER_IS_BETTER else (a > b)


def worst(metric: str) -> float:
    """A value worse than every real one."""
    return math.inf if metric in LOWER_IS_BETTER else -math.inf


def noise(metric: str, one: float, other: float, rows: float) -> float:
    """Two standard errors of the difference between two shares of rows; 0 for a metric that is none."""
    if metric not in SHARES or not rows:
        return 0.0
    return 2 * math.sqrt((one * (1 - one) + other * (1 - other)) / rows)


def compute(names: Sequence[Metric], predicted: Any, expected: Any) -> dict[str, float]:
    """The named metrics of predictions.

    Args:
        names: metrics; loss and perplexity come from the model and are skipped here.
        predicted: class ids (classification), numbers (regression) or texts (exact_match), one per row.
        expected: of the same form.

    Returns:
        Name -> value. An undefined correlation (constant predictions) is 0, as in GLUE's tools.
    """
    return {name: _one(name, predicted, expected) for name in names if name not in ("loss", "perplexity")}


def _one(name: Metric, predicted: Any, expected: Any) -> float:
    from scipy import stats
    from sklearn import metrics

    if name == "exact_match":
        return float(np.mean([p.strip() == e.strip() for p, e in zip(predicted, expected, strict=True)]))
    p, e = np.asarray(predicted), np.asarray(expected)
    if name == "accuracy":
        return float(metrics.accuracy_score(e, p))
    if name == "f1":
        classes = len(set(e.tolist()) | set(p.tolist()))
        average = "binary" if classes <= 2 and set(e.tolist()) | set(p.tolist()) <= {0, 1} else "macro"
        return float(metrics.f1_score(e, p, average=average, zero_division=0.0))
    if name == "matthews":
        return float(metrics.matthews_corrcoef(e, p))
    if name == "mse":
        return float(metrics.mean_squared_error(e, p))
    if np.ptp(p) == 0 or np.ptp(e) == 0:
        return 0.0
    result = stats.pearsonr(p, e) if name == "pearson" else stats.spearmanr(p, e)
    return float(np.nan_to_num(result.statistic))


def shown(name: str, value: float | None) -> str:
    """A metric as text: shares and correlations in percent, differences with a sign."""
    if value is None or math.isnan(value):
        return "-"
    if name == "forgetting":
        return f"{value:+.4f}"
    return f"{value:.4f}" if name in LOWER_IS_BETTER else f"{100 * value:.1f}"


def figures(values: Mapping[str, float]) -> list[str]:
    """Metrics as in a line of progress: `accuracy 65.5`."""
    return [
        f"{name.replace('_', ' ')} {shown('loss' if name.endswith('loss') else name, value)}"
        for name, value in values.items()
    ]
