"""The search for learning rate and scale: the same rule for everybody."""

from __future__ import annotations

import pytest

from lily.compare.doubling import MOST, best_powers, next_powers
from lily.search import engine

UP = "accuracy"


def search(value, scaled=True):
    """Let the search end on a function of the two powers; how many runs it took and what it chose."""
    tried = []

    def run(round_):
        assert not set(round_) & set(tried)
        tried.extend(round_)
        return {powers: value(*powers) for powers in round_}

    found = engine.search(lambda values: next_powers(values, UP, scaled), run)
    return found, best_powers(found, UP)


def test_a_peak_at_the_recipes_own_values_takes_five_runs():
    found, best = search(lambda rate, scale: -float(rate**2 + scale**2))
    assert best == (0, 0)
    assert len(found) == 5


def test_a_peak_beyond_the_first_values_is_followed():
    found, best = search(lambda rate, scale: -float((rate - 3) ** 2 + (scale + 2) ** 2))
    assert best == (3, -2)
    assert max(rate for rate, _ in found) == 4


def test_it_ends_where_there_is_no_peak():
    _, best = search(lambda rate, scale: float(rate + scale))
    assert best == (MOST, MOST)


def test_a_method_without_a_scale_is_tried_at_learning_rates_alone():
    found, best = search(lambda rate, scale: -float((rate - 1) ** 2), scaled=False)
    assert best == (1, 0)
    assert {scale for _, scale in found} == {0}


def test_runs_that_diverge_lead_to_lower_learning_rates():
    found, best = search(lambda rate, scale: None if rate > -2 else -float(rate**2), scaled=False)
    assert best == (-2, 0)
    assert min(rate for rate, _ in found) == -3


def test_where_all_fail_nothing_is_chosen():
    found, best = search(lambda rate, scale: None)
    assert best is None
    assert min(rate for rate, _ in found) == -MOST


def test_of_equals_the_recipes_own_is_kept():
    assert search(lambda rate, scale: 0.5)[1] == (0, 0)


@pytest.mark.parametrize(("metric", "best"), [("accuracy", (1, 0)), ("loss", (-1, 0))])
def test_the_metric_decides_what_is_better(metric, best):
    found = {(0, 0): 0.5, (-1, 0): 0.4, (1, 0): 0.6}
    assert best_powers(found, metric) == best
