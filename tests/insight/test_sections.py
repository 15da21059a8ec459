"""Sections of the page, on adapters of more layers than a test trains."""

from __future__ import annotations

import re

import pytest

from lily.analysis.history import RoutingHistory
from lily.analysis.routing import LayerRouting, RoutingReport
from lily.insight import routing_sections
from lily.insight.gather import Insight
from lily.plan.config import LilyConfig
from lily.plan.sharing_plan import ModuleSpec, build_plan


def insight(layers, silent=()):
    """An adapter on so many layers; those that are named had no token in the second step."""
    names = [f"layers.{i}.up" for i in range(layers)]
    specs = [ModuleSpec(name, 8, 8) for name in names]
    plan = build_plan(specs, LilyConfig(r=2, num_A=1, num_B=2, target_modules="all-linear"))
    found = [
        LayerRouting(name, "up (8, 8)", 0, 9, (0.25, 0.75), ((0.1, 0.1), (0.1, 0.6)), 0.5, None, {}) for name in names
    ]
    rows = ((0.25, 0.75), (0.5, 0.5), (0.1, 0.9))
    tokens = {name: (4, 0 if name in silent else 4, 4) for name in names}
    history = RoutingHistory((1, 2, 3), tokens, dict.fromkeys(names, rows))
    return Insight({}, plan=plan, routing=RoutingReport("token", 3, (), tuple(found), ()), history=history)


def curves(text):
    return re.findall(r'<polyline points="([^"]*)" class="curve (\w+)"', text)


@pytest.mark.parametrize("layers", [8, 9, 40])
def test_layers_over_training_are_told_by_name_or_by_depth(layers):
    text = routing_sections.routing(insight(layers))
    styles = [style for _, style in curves(text)]
    assert len(styles) == layers
    if layers == 8:
        assert styles == [f"l{i}" for i in range(8)]
        assert text.count("key line l") == 8
    else:
        assert (styles[0], styles[-1]) == ("d0", "d11")
        assert "by depth: layer 0<span" in text
        assert f"to layer {layers - 1}</li>" in text
    assert f"<title>layer {layers - 1}</title>" in text


def test_a_step_without_a_layers_tokens_is_a_gap_and_a_layer_that_never_ran_is_left_out():
    told = insight(3, silent=("layers.1.up",))
    told.history.tokens["layers.2.up"] = (0, 0, 0)
    text = routing_sections.routing(told)
    assert [len(points.split()) for points, _ in curves(text)] == [3, 2]
    for name in told.history.tokens:
        told.history.tokens[name] = (0, 0, 0)
    assert "While it learned" not in routing_sections.routing(told)
