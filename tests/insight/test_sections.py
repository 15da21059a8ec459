"""Sections of the page, on adapters of more layers than a test trains."""

from __future__ import annotations

import re

import pytest

from lily.analysis.history import RoutingHistory
from lily.analysis.routing import LayerRouting, RoutingReport
from lily.html.page import Page, Section
from lily.insight import routing_sections
from lily.insight.gather import Insight
from lily.plan.config import LilyConfig
from lily.plan.sharing_plan import ModuleSpec, build_plan


def insight(layers, silent=()):
    """An adapter on `layers` layers; the `silent` ones got no token in the second step."""
    names = [f"layers.{i}.up" for i in range(layers)]
    specs = [ModuleSpec(name, 8, 8) for name in names]
    plan = build_plan(specs, LilyConfig(r=2, num_A=1, num_B=2, target_modules="all-linear"))
    routed = [
        LayerRouting(name, "up (8, 8)", 0, 9, (0.25, 0.75), ((0.1, 0.1), (0.1, 0.6)), 0.5, None, {}) for name in names
    ]
    rows = ((0.25, 0.75), (0.5, 0.5), (0.1, 0.9))
    tokens = {name: (4, 0 if name in silent else 4, 4) for name in names}
    history = RoutingHistory((1, 2, 3), tokens, dict.fromkeys(names, rows))
    return Insight({}, plan=plan, routing=RoutingReport("token", 3, (), tuple(routed), ()), history=history)


def routing(analysis):
    """The section about the routers, as HTML."""
    return Page("t", "h", "s", [Section("routing", "Routing", routing_sections.routing(analysis))]).render()


def curves(text):
    return re.findall(r'<polyline points="([^"]*)" class="curve (\w+)"', text)


@pytest.mark.parametrize("layers", [8, 9, 40])
def test_layers_over_training_are_colored_by_name_or_by_depth(layers):
    text = routing(insight(layers))
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
    analysis = insight(3, silent=("layers.1.up",))
    analysis.history.tokens["layers.2.up"] = (0, 0, 0)
    text = routing(analysis)
    assert [len(points.split()) for points, _ in curves(text)] == [3, 2]
    for name in analysis.history.tokens:
        analysis.history.tokens[name] = (0, 0, 0)
    assert "While it learned" not in routing(analysis)
