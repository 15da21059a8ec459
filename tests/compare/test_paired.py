"""Paired tests against scipy's, and against what is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lily.compare.paired import compare, mcnemar


def items(rng, rows, right):
    correct = (rng.random(rows) < right).astype(int)
    return {"accuracy": correct.tolist(), "expected": [1] * rows, "predicted": correct.tolist()}


def test_mcnemars_exact_test_is_the_binomial_one_on_the_rows_where_they_differ():
    first = [1] * 40 + [1] * 9 + [0] * 2 + [0] * 5
    second = [1] * 40 + [0] * 9 + [1] * 2 + [0] * 5
    a, b, p = mcnemar(first, second)
    assert (a, b) == (9, 2)
    assert p == pytest.approx(2 * stats.binom.cdf(2, 11, 0.5))
    found = compare("accuracy", [{"accuracy": first}], [{"accuracy": second}])
    assert (found.test, found.n, found.p) == ("McNemar, exact", 56, p)
    assert found.difference == pytest.approx(7 / 56)
    assert found.low < 7 / 56 < found.high


def test_two_methods_that_agree_everywhere_do_not_differ():
    same = {"accuracy": [1, 0, 1, 1], "loss": [0.1, 2.0, 0.3, 0.2]}
    assert compare("accuracy", [same], [same]).p == 1
    assert compare("loss", [same], [same]).p == 1


def test_over_several_seeds_the_rows_are_swapped_for_all_seeds_together():
    rng = np.random.default_rng(0)
    first = [items(rng, 60, 0.9) for _ in range(3)]
    second = [items(rng, 60, 0.6) for _ in range(3)]
    found = compare("accuracy", first, second)
    assert found.test == "paired permutation"
    assert len(found.by_seed) == 3
    assert found.p < 0.01
    means = [np.mean([s["accuracy"] for s in seeds], 0) for seeds in (first, second)]
    assert found.difference == pytest.approx(np.mean(means[0]) - np.mean(means[1]))
    exact = stats.permutation_test(
        means, lambda a, b: np.mean(a) - np.mean(b), permutation_type="samples", n_resamples=5000, random_state=1
    )
    assert found.p == pytest.approx(exact.pvalue, abs=0.01)
    one_sided = stats.wilcoxon(*means)
    assert one_sided.pvalue < 0.01


@pytest.mark.parametrize(
    "metric",
    [
        *("pearson", "spearman", "loss", "perplexity", "mse"),
        *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("matthews", "f1")),
    ],
)
def test_other_metrics_are_taken_again_with_the_rows_swapped(metric, monkeypatch):
    monkeypatch.setattr("lily.compare.paired.RESAMPLES", 300)  # scikit-learn takes a millisecond for each
    rng = np.random.default_rng(1)
    expected = rng.integers(0, 2, 40)
    noisy = [{"expected": expected.tolist(), "predicted": np.where(rng.random(40) < q, 1 - expected, expected).tolist(),
              "loss": (rng.random(40) + q).tolist()} for q in (0.05, 0.4)]  # fmt: skip
    found = compare(metric, noisy[:1], noisy[1:])
    lower = metric in ("loss", "perplexity", "mse")
    assert (found.difference < 0) == lower
    assert found.p < 0.05
    back = compare(metric, noisy[1:], noisy[:1])
    assert back.difference == pytest.approx(-found.difference)


def test_the_loss_of_a_causal_model_is_weighed_by_tokens():
    first = {"loss": [2.0, 30.0], "tokens": [1, 10]}
    second = {"loss": [1.0, 40.0], "tokens": [1, 10]}
    assert compare("loss", [first], [second]).difference == pytest.approx(32 / 11 - 41 / 11)


@pytest.mark.parametrize(
    ("metric", "bad"), [("loss", math.nan), ("loss", math.inf), ("loss", 1.7e308), ("mse", math.nan)]
)
def test_of_what_is_not_finite_there_is_no_test(metric, bad):
    rng = np.random.default_rng(2)
    right = {"loss": rng.random(30).tolist(), "predicted": rng.random(30).tolist(), "expected": [0.5] * 30}
    wrong = {**right, "loss": [bad, *right["loss"][1:]], "predicted": [bad, *right["predicted"][1:]]}
    assert compare(metric, [right], [wrong]) is None
    assert compare(metric, [wrong], [right]) is None


def test_other_rows_are_not_compared():
    assert compare("accuracy", [{"accuracy": [1, 0]}], [{"accuracy": [1]}]) is None
    assert compare("pearson", [{"accuracy": [1, 0]}], [{"accuracy": [1, 0]}]) is None
