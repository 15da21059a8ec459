"""The shapes that one budget buys."""

from __future__ import annotations

import pytest

from lily.analysis.granularity import frontier
from lily.budget import lora_parameters
from lily.errors import LilyError
from lily.plan.config import LilyConfig
from lily.plan.sharing_plan import ModuleSpec, build_plan

MODULES = [ModuleSpec(f"layers.{i}.{n}", 64, out) for i in range(6) for n, out in (("q_proj", 64), ("up", 256))]


def test_every_point_is_within_the_budget_uses_it_well_and_is_the_largest_that_fits():
    budget = lora_parameters(MODULES, 4)
    points = frontier(MODULES, budget)
    assert len(points) > 10
    for p in points:
        options = {"r": p.r, "num_A": p.num_A, "num_B": p.num_B, "target_modules": "all-linear", "routing": "token"}
        size = build_plan(MODULES, LilyConfig(**options)).parameters.total
        assert size == p.parameters
        assert 0.9 * budget <= size <= budget
        assert p.share == pytest.approx(size / budget)
        larger = build_plan(MODULES, LilyConfig(**{**options, "r": p.r + 1})).parameters.total
        assert larger > budget or p.r == 64


def test_sharing_more_buys_rank_and_equal_sharings_appear_once():
    points = frontier(MODULES, lora_parameters(MODULES, 2))
    assert [p.r for p in points] == sorted((p.r for p in points), reverse=True)
    assert max(points, key=lambda p: p.r).num_A * max(points, key=lambda p: p.r).num_B < 6
    # six layers: num_A 4 and 5 both mean three A of two layers
    assert {p.num_A for p in points} <= {1, 2, 3, 6}
    assert len({(p.num_A, p.num_B) for p in points}) == len(points)


def test_the_values_to_look_at_can_be_given():
    points = frontier(MODULES, "6k", num_A=[2], num_B=[1, 2])
    assert {(p.num_A, p.num_B) for p in points} == {(2, 1), (2, 2)}
    assert all(p.union == min(256, p.num_B * p.r) for p in points)
    assert frontier(MODULES, "6k", num_A=iter([1, 2]), num_B=iter([1, 2])) == frontier(
        MODULES, "6k", num_A=[1, 2], num_B=[1, 2]
    )


def test_a_budget_that_buys_nothing_is_refused():
    with pytest.raises(LilyError, match="too few"):
        frontier(MODULES, 10)
    with pytest.raises(LilyError, match="the layers' sizes limit the rank"):
        frontier(MODULES, "900M")
