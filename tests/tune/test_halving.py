"""Successive halving: which runs continue, and how far."""

from __future__ import annotations

import pytest

from lily.tune.halving import Rung, next_runs, rungs


def test_each_rung_takes_twice_the_steps_and_keeps_half():
    assert rungs(8, 400) == (Rung(100, 4), Rung(200, 2), Rung(None, 2))
    assert rungs(6, 400) == (Rung(100, 3), Rung(200, 2), Rung(None, 2))
    assert rungs(9, 900, factor=3, survivors=1) == (Rung(100, 3), Rung(300, 1), Rung(None, 1))


def test_there_is_no_rung_where_there_is_nothing_to_halve():
    assert rungs(2, 100) == (Rung(None, 2),)
    assert rungs(1, 100) == (Rung(None, 1),)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_short_runs_have_fewer_rungs_each_longer_than_the_one_before(steps):
    found = rungs(8, steps)
    until = [rung.until for rung in found[:-1]]
    assert until == sorted(set(until))
    assert all(0 < u < steps for u in until)
    assert found[-1] == Rung(None, 2)


def survivors(values, keep, metric):
    """Which of the first rung's entrants run in the second one."""
    stages = (Rung(10, keep), Rung(None, keep))
    runs = next_runs({(0, one): value for one, value in values.items()}, stages, list(values), metric)
    assert {index for index, _ in runs} <= {1}
    return [one for _, one in runs]


def test_the_better_ones_continue_in_their_order_and_failed_ones_do_not():
    values = {"a": 0.5, "b": None, "c": 0.9, "d": 0.7, "e": 0.7}
    assert survivors(values, 2, "accuracy") == ["c", "d"]
    assert survivors(values, 2, "loss") == ["a", "d"]
    assert survivors(values, 9, "accuracy") == ["a", "c", "d", "e"]
    assert survivors({"a": None}, 1, "accuracy") == []


def test_all_begin_and_nothing_follows_the_last_rung():
    stages = (Rung(10, 1), Rung(None, 1))
    assert next_runs({}, stages, ["a", "b"], "accuracy") == [(0, "a"), (0, "b")]
    assert next_runs({(0, "a"): 0.1, (0, "b"): 0.2, (1, "b"): 0.3}, stages, ["a", "b"], "accuracy") == []
