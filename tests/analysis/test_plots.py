"""Figures with matplotlib: axes with units, legends, alternative text, files."""

from __future__ import annotations

import re

import pytest
from analysed import adapted, lora
from helpers import inputs
from paths import ROOT

from lily.analysis.factored import lily_layers, lora_layers
from lily.analysis.granularity import frontier
from lily.analysis.plots import granularity_plot, rank_plot, router_plot, sharing_plot
from lily.analysis.rank import rank_report
from lily.analysis.routing import routing_report
from lily.checkpoint.format import specs_of
from lily.errors import LilyError
from lily.tuner.adapter import find

PAGE = ROOT / "docs" / "insight.md"


@pytest.fixture(scope="module")
def reports():
    model = adapted("bert", routing="token", target_modules=["query", "value"])
    routing = routing_report(model, [inputs("bert")], ["a", "b", "a"])
    rank = rank_report(lily_layers(model), routing.mixings)
    return find(model).plan, rank, rank_report(lora_layers(lora(init_lora_weights=False))), routing


@pytest.mark.parametrize("kind", ["rank", "router", "sharing", "granularity"])
def test_every_figure_has_labels_on_its_axes_a_legend_and_an_alternative_text(reports, kind, tmp_path):
    plan, rank, lora_rank, routing = reports
    picture = {
        "rank": lambda: rank_plot(rank, lora_rank),
        "router": lambda: router_plot(routing),
        "sharing": lambda: sharing_plot(plan, routing),
        "granularity": lambda: granularity_plot(frontier(specs_of(plan), 4000)),
    }[kind]()
    for axes in picture.figure.axes:
        assert axes.get_ylabel() or axes.get_yticklabels()
        if axes.get_label() != "<colorbar>":
            assert axes.get_xlabel()
    legends = [axes.get_legend() for axes in picture.figure.axes]
    assert any(legends) or kind == "router"  # its legend is the colour bar
    assert len(picture.alt) > 40
    assert picture.alt.rstrip().endswith(".")
    for name in ("a.svg", "a.png"):
        picture.save(tmp_path / name)
    assert "<text" in (tmp_path / "a.svg").read_text()
    with pytest.raises(LilyError, match="exists"):
        picture.save(tmp_path / "a.svg")
    with pytest.raises(LilyError, match="not supported"):
        picture.save(tmp_path / "a.bogus")
    assert not (tmp_path / "a.bogus").exists()


def test_the_alternative_text_tells_the_ranks_of_both(reports):
    _, rank, lora_rank, _ = reports
    said = rank_plot(rank, lora_rank).alt
    assert f"numerical rank {rank.median():g}" in said
    assert f"numerical rank {lora_rank.median():g}" in said


def test_without_experts_there_is_no_router_to_draw():
    with pytest.raises(LilyError, match="nothing is routed"):
        router_plot(routing_report(adapted("bert", num_B=1)))


def test_the_example_of_the_page_on_insight_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope = {
        "peft_model": adapted("bert", routing="token"),
        "batches": [inputs("bert")],
        "labels": ["a", "b", "a"],
    }
    exec(compile(code, "insight.md", "exec"), scope)
    assert (tmp_path / "rank.svg").is_file()
