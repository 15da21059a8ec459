"""The page about an adapter: one HTML file with everything in it."""

from __future__ import annotations

from lily.analysis.sentences import short_rank_words
from lily.html.page import Details, Page, Section, Terms
from lily.insight import rank_sections, routing_sections, run_sections, sections
from lily.insight.definitions import TERMS
from lily.insight.gather import Insight
from lily.recipes.results.standing import standing
from lily.recipes.scoring.metrics import shown


def page(insight: Insight) -> str:
    """The page as HTML; sections without data are left out."""
    facts, run = insight.facts, insight.run
    name = run.name if run is not None else facts["folder"]
    config = facts.get("config", {})
    routing = "one B, nothing is routed" if config.get("num_B") == 1 else f"{config.get('routing')} routing"
    kind = f"{facts['kind']}, {routing}" if config.get("routing") else facts["kind"]
    measured = f"; routing measured on {insight.read}" if insight.read else ""
    lead = "" if run is None else standing(run)
    if not lead and insight.rank is not None:
        lead = short_rank_words(insight.rank, insight.lora, insight.equal_lora)
    definitions = Details("Definitions and limits", Terms(TERMS.items()), open=True)
    parts = [
        Section("result", "Was it worth it?", run_sections.result(insight)),
        Section("training", "How it was learned", run_sections.training(insight)),
        Section("wrong", "What it gets wrong", run_sections.wrong(insight)),
        Section("answers", "What it answers", run_sections.answers(insight)),
        Section("sharing", "What is shared", sections.sharing(insight)),
        Section("rank", "How much rank there is", rank_sections.rank(insight)),
        Section("overlap", "What sharing did", rank_sections.overlap(insight)),
        Section("routing", "What the routers do", routing_sections.routing(insight)),
        Section("sizes", "Sizes", sections.sizes(insight)),
        Section("collapse", "What becoming static cost", sections.collapse(insight)),
        Section("about", "Configuration and origin", sections.about(insight)),
        Section("definitions", "How to read this page", [definitions]),
    ]
    return Page(
        title=f"{name}: inside the adapter",
        heading=name,
        subtitle=f"{kind}: {facts['folder']}{measured}",
        sections=parts,
        lead=lead,
        tiles=_tiles(insight),
        notes=insight.notes,
    ).render()


def _tiles(insight: Insight) -> list[tuple[str, str]]:
    tiles: list[tuple[str, str]] = []
    run = insight.run
    if run is not None and run.metric in run.final:
        before = f", {shown(run.metric, run.before[run.metric])} before" if run.metric in run.before else ""
        tiles.append((shown(run.metric, run.final[run.metric]), f"{run.metric} on the {run.split} rows{before}"))
    if insight.plan is not None:
        tiles.append((f"{insight.plan.parameters.total:,}", "trained parameters"))
    if insight.rank is not None:
        tiles.append((f"{insight.rank.median():g}", "median numerical rank of a layer's update"))
    if insight.lora is not None:
        tiles.append((f"{insight.lora.median():g}", "median numerical rank of the LoRA trained beside it"))
    elif insight.equal_lora is not None:
        tiles.append((f"{insight.equal_lora}", "rank of LoRA with as many parameters"))
    return [*tiles, (f"{insight.facts['bytes'] / 1e6:.2f} MB", "on disk")]
