"""Metrics against hand-computed values."""

from __future__ import annotations

import math

import pytest

from lily.recipes.scoring import metrics


@pytest.mark.parametrize(
    ("name", "predicted", "expected", "value"),
    [
        ("accuracy", [0, 1, 1, 0], [0, 1, 0, 0], 0.75),
        ("f1", [0, 1, 1, 0], [0, 1, 0, 0], 2 / 3),
        ("f1", [0, 1, 2], [0, 1, 1], (1 + 2 / 3 + 0) / 3),
        ("matthews", [0, 1, 1, 0], [0, 1, 0, 0], (1 * 2 - 1 * 0) / math.sqrt(2 * 1 * 3 * 2)),
        ("matthews", [1, 1], [0, 1], 0.0),
        ("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
        ("spearman", [1.0, 2.0, 3.0], [1.0, 8.0, 27.0], 1.0),
        ("pearson", [1.0, 1.0], [0.0, 1.0], 0.0),
        ("mse", [1.0, 3.0], [0.0, 1.0], 2.5),
        ("exact_match", ["yes ", "no"], ["yes", "yes"], 0.5),
    ],
)
def test_a_metric_has_its_value(name, predicted, expected, value):
    assert metrics.compute([name], predicted, expected)[name] == pytest.approx(value)


def test_direction_and_nan():
    assert metrics.better("accuracy", 0.6, 0.5)
    assert metrics.better("loss", 0.4, 0.5)
    assert not metrics.better("accuracy", float("nan"), 0.5)
    assert not metrics.better("loss", float("nan"), 0.5)
    assert metrics.better("loss", 0.5, float("nan"))
    assert not metrics.better("loss", float("nan"), float("nan"))
    assert metrics.shown("accuracy", 0.5) == "50.0"
    assert metrics.shown("loss", 0.5) == "0.5000"
    assert metrics.shown("loss", None) == "-"
