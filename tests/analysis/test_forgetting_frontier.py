"""Quality against forgetting: frontiers and what is reached within a limit."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import pytest

from lily.analysis.forgetting import Outcome, best_within, by_contestant, frontier, moved
from lily.analysis.plots import forgetting_plot
from lily.errors import LilyError


def outcomes(*pairs, name="Lily"):
    return [Outcome(name, quality, forgetting) for quality, forgetting in pairs]


def test_the_frontier_is_what_no_other_outcome_beats():
    random.seed(0)
    points = outcomes(*((random.randrange(8), random.randrange(8)) for _ in range(60)))

    def beaten(one):
        return any(
            o.quality >= one.quality
            and o.forgetting <= one.forgetting
            and (o.quality, o.forgetting) != (one.quality, one.forgetting)
            for o in points
        )

    found = frontier(points)
    assert {(o.quality, o.forgetting) for o in found} == {(o.quality, o.forgetting) for o in points if not beaten(o)}
    assert [o.forgetting for o in found] == sorted({o.forgetting for o in found})
    assert frontier([]) == []


def test_the_best_within_a_limit_is_on_the_frontier():
    points = outcomes((0.5, 0.0), (0.8, 0.2), (0.8, 0.1), (0.9, 0.4))
    assert best_within(points, 0.3) == Outcome("Lily", 0.8, 0.1)
    assert best_within(points, 1.0).quality == 0.9
    assert best_within(points, -0.1) is None


def test_a_rule_moves_a_frontier_by_what_it_adds_within_each_limit():
    lily, rule = outcomes((0.5, 0.0), (0.9, 0.4)), outcomes((0.8, 0.1))
    assert moved([*lily, *rule], lily, (0.05, 0.2, 0.5, -1)) == {0.05: 0.0, 0.2: pytest.approx(0.3), 0.5: 0.0, -1: None}


def test_the_figure_has_a_line_for_each_contestant_and_says_where_it_leads(tmp_path):
    points = [*outcomes((50.0, 0.0), (90.0, 0.4)), *outcomes((60.0, 0.1), name="LoRA")]
    assert list(by_contestant(points)) == ["Lily", "LoRA"]
    picture = forgetting_plot(points, "accuracy (%)")
    (panel,) = picture.figure.axes
    assert [t.get_text() for t in panel.get_legend().get_texts()] == ["Lily", "LoRA"]
    assert "nats per token" in panel.get_xlabel()
    assert panel.get_ylabel() == "accuracy (%)"
    assert "Lily from 50 at +0 to 90 at +0.4; LoRA from 60 at +0.1" in picture.alt
    picture.save(tmp_path / "a.svg")
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    with pytest.raises(LilyError, match="nothing was trained"):
        forgetting_plot([], "accuracy")
