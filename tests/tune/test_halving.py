"""Successive halving: who goes on, and how far."""

from __future__ import annotations

import pytest

from lily.tune.halving import Rung, rungs, survivors


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


def test_the_better_ones_go_on_in_their_order_and_failed_ones_do_not():
    values = {"a": 0.5, "b": None, "c": 0.9, "d": 0.7, "e": 0.7}
    assert survivors(values, 2, lambda a, b: a > b) == ["c", "d"]
    assert survivors(values, 2, lambda a, b: a < b) == ["a", "d"]
    assert survivors(values, 9, lambda a, b: a > b) == ["a", "c", "d", "e"]
    assert survivors({"a": None}, 1, lambda a, b: a > b) == []
