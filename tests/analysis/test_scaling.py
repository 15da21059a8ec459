"""Learning rate and scale together: products, what is near the best, and the figure."""

from __future__ import annotations

import pytest

from lily.analysis.plots import settings_plot
from lily.analysis.scaling import Tried, by_product, near
from lily.errors import LilyError


def grid(contestant="Lily", best=1e-3):
    """Quality that depends on the product alone: 80 at `best`, one less for each factor of four."""
    import math

    found = []
    for rate in (2.5e-4, 1e-3, 4e-3):
        for scale in (0.25, 1.0, 4.0):
            found.append(Tried(contestant, rate, scale, 80 - abs(math.log(rate * scale / best, 4))))
    return found


def test_products_that_are_equal_but_for_rounding_are_one():
    assert Tried("Lily", 4e-3, 0.25, 0).product == Tried("Lily", 2.5e-4, 4.0, 0).product == 1e-3
    found = by_product(grid())
    assert list(found) == [6.25e-5, 2.5e-4, 1e-3, 4e-3, 1.6e-2]
    assert [round(t.quality) for t in found.values()] == [78, 79, 80, 79, 78]


def test_near_the_best_are_those_within_the_tolerance():
    assert {t.product for t in near(grid(), 0.5)} == {1e-3}
    assert len(near(grid(), 1.001)) == 7
    assert near([], 1) == []


def test_the_figure_has_a_panel_for_each_task_and_contestant(tmp_path):
    picture = settings_plot({"a": [*grid(), *grid("LoRA", 4e-3)], "b": grid()}, "accuracy (%)")
    titled = [axes for axes in picture.figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in titled] == ["a: Lily", "a: LoRA", "b: Lily", "b: LoRA"]
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in titled)
    assert "a, LoRA: best 80 at learning rate 0.001 and scale 4" in picture.alt
    picture.save(tmp_path / "a.svg")
    with pytest.raises(LilyError, match="nothing was trained"):
        settings_plot({"a": []}, "accuracy")
