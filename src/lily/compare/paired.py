"""Whether two methods differ on the same held-out rows: paired tests, by scipy.

The tests treat the rows as random and the trained models as fixed. How much another seed changes a model shows in the
spread over seeds, not in these p-values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lily.recipes.scoring import metrics as metric_tools
from lily.recipes.spec.schema import Metric

RESAMPLES = 2000
Items = dict[str, list[Any]]
# Metrics that are a share of correct rows.
COUNTS = ("accuracy", "accuracy_norm", "exact_match")
LOSSES = ("loss", "perplexity")


@dataclass(frozen=True)
class Paired:
    """A paired comparison."""

    test: str  # `McNemar, exact` or `paired permutation`
    n: int  # number of rows
    difference: float  # first minus second value of the metric, mean over seeds
    low: float  # lower end of the 95% interval of the difference, by a bootstrap over rows
    high: float  # upper end of it
    p: float  # two-sided
    # rows that only the first method has correct, summed over seeds; None for other metrics
    only_first: int | None = None
    only_second: int | None = None  # rows that only the second has correct
    by_seed: tuple[float, ...] = ()  # p of McNemar's exact test per seed; empty for other metrics


def mcnemar(first: Sequence[int], second: Sequence[int]) -> tuple[int, int, float]:
    """McNemar's exact test: (rows that only the first has correct, rows that only the second has, two-sided p)."""
    from scipy.stats import binomtest

    a, b = np.asarray(first, bool), np.asarray(second, bool)
    mine, theirs = int((a & ~b).sum()), int((b & ~a).sum())
    return mine, theirs, float(binomtest(mine, mine + theirs, 0.5).pvalue) if mine + theirs else 1.0


def compare(metric: Metric, first: Sequence[Items], second: Sequence[Items], seed: int = 0) -> Paired | None:
    """Compare two methods on the same rows.

    With one seed and a metric that is a share of correct rows this is McNemar's exact test. Otherwise it is a paired
    permutation test of the difference of the metric (mean over seeds): rows are swapped between the two methods, each
    for all seeds together.

    Args:
        metric: to compare.
        first: results by row, one dictionary per seed; see `lily.recipes.scoring.evaluate.Judge`.
        second: results of the other method, with the same seeds.
        seed: of the resampling.

    Returns:
        None where no test is possible: different rows, no results by row, or values that are not finite.
    """
    statistic = _statistic(metric, first, second)
    if statistic is None:
        return None
    rows, difference = statistic
    names = np.arange(rows)
    low, high = _interval(difference, names, rows, seed)
    kept: dict[str, Any] = {"n": rows, "difference": float(difference(names, names + rows)), "low": low, "high": high}
    if not all(map(math.isfinite, (kept["difference"], low, high))):
        return None
    if metric not in COUNTS:
        return Paired("paired permutation", p=_permuted(difference, names, rows, seed), **kept)
    tests = [mcnemar(a[metric], b[metric]) for a, b in zip(first, second, strict=True)]
    counts: dict[str, Any] = {"only_first": sum(t[0] for t in tests), "only_second": sum(t[1] for t in tests)}
    by_seed = tuple(t[2] for t in tests)
    if len(tests) == 1:
        return Paired("McNemar, exact", p=by_seed[0], by_seed=by_seed, **counts, **kept)
    return Paired("paired permutation", p=_permuted(difference, names, rows, seed), by_seed=by_seed, **counts, **kept)


Difference = Callable[[Any, Any], float]


def _statistic(metric: Metric, first: Sequence[Items], second: Sequence[Items]) -> tuple[int, Difference] | None:
    """The number of rows, and the difference of the metric as a function of two arrays of result indices.

    Index i is row i of the first method, `rows + i` row i of the second.
    """
    columns = (metric,) if metric in COUNTS else ("loss",) if metric in LOSSES else ("predicted", "expected")
    if any(not items.get(name) for items in (*first, *second) for name in columns):
        return None
    sizes = {len(items[columns[0]]) for items in (*first, *second)}
    if len(sizes) != 1 or len(first) != len(second):
        return None
    values = [[np.array([*a[name], *b[name]], float) for a, b in zip(first, second, strict=True)] for name in columns]
    # comparisons with NaN are false, so a single one would make p look significant
    if not all(np.isfinite(v).all() for column in values for v in column):
        return None
    if metric in COUNTS:
        means = np.mean(values[0], 0)
        return sizes.pop(), lambda a, b: float(means[a].mean() - means[b].mean())
    if metric in LOSSES:
        ones = [1] * len(first[0]["loss"])
        weights = [np.array([*(a.get("tokens") or ones), *(b.get("tokens") or ones)], float)
                   for a, b in zip(first, second, strict=True)]  # fmt: skip

        def mean_loss(rows: Any) -> float:
            losses = [v[rows].sum() / max(w[rows].sum(), 1.0) for v, w in zip(values[0], weights, strict=True)]
            return float(np.mean([math.exp(min(loss, 80.0)) if metric == "perplexity" else loss for loss in losses]))

        return sizes.pop(), lambda a, b: mean_loss(a) - mean_loss(b)

    def mean_metric(rows: Any) -> float:
        return float(np.mean([metric_tools.compute([metric], predicted[rows], expected[rows])[metric]
                              for predicted, expected in zip(*values, strict=True)]))  # fmt: skip

    return sizes.pop(), lambda a, b: mean_metric(a) - mean_metric(b)


def _permuted(difference: Difference, names: Any, rows: int, seed: int) -> float:
    from scipy.stats import permutation_test

    result = permutation_test(
        (names, names + rows),
        lambda a, b: difference(a.astype(int), b.astype(int)),
        permutation_type="samples",
        vectorized=False,
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _interval(difference: Difference, names: Any, rows: int, seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(0, rows, rows) for _ in range(RESAMPLES))
    low, high = np.quantile([difference(chosen, chosen + rows) for chosen in drawn], [0.025, 0.975])
    return float(low), float(high)
