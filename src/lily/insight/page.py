"""The page about an adapter: one HTML file with everything in it."""

from __future__ import annotations

from lily._version import __version__
from lily.analysis.sentences import plan_words, short_rank_words
from lily.html.markup import Html, el, join
from lily.html.style import CSS
from lily.insight import rank_sections, routing_sections, sections
from lily.insight.definitions import definitions
from lily.insight.gather import Insight
from lily.recipes.scoring.metrics import shown

# Nothing is fetched and nothing runs, whatever a stranger's file holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(told: Insight) -> str:
    """The page as text.

    Args:
        told: what is known; parts that are not are left out.
    """
    name = told.run.name if told.run is not None else told.facts["folder"]
    parts = [(id_, title, body) for id_, title, body in _sections(told) if body]
    contents = el("ol", *(el("li", el("a", title, href=f"#{id_}")) for id_, title, _ in parts))
    nav = el("nav", contents, aria_label="On this page") if len(parts) > 2 else None
    body = join(
        el("header", el("h1", name), el("p", _kind(told), cls="kind"), nav),
        el(
            "main",
            _lead(told),
            _tiles(told),
            *(el("p", note, cls="note") for note in told.notes),
            *(
                el("section", el("h2", title, id=f"{id_}-title"), content, id=id_, aria_labelledby=f"{id_}-title")
                for id_, title, content in parts
            ),
        ),
        el("footer", el("p", f"Written by lily {__version__}. The page holds no script and loads nothing.")),
    )
    return document(f"{name}: inside the adapter", body)


def document(title: str, body: Html) -> str:
    """A whole page: the body with the style and the policy that nothing is fetched and nothing runs."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"{el('title', title)}\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _sections(told: Insight) -> list[tuple[str, str, Html | None]]:
    return [
        ("result", "Was it worth it?", sections.result(told)),
        ("sharing", "What is shared", sections.sharing(told)),
        ("rank", "How much rank there is", rank_sections.rank(told)),
        ("overlap", "What sharing did", rank_sections.overlap(told)),
        ("routing", "What the routers do", routing_sections.routing(told)),
        ("training", "How it was trained", sections.training(told)),
        ("sizes", "Sizes", sections.sizes(told)),
        ("collapse", "What becoming static cost", sections.collapse(told)),
        ("about", "Configuration and origin", sections.about(told)),
        ("definitions", "How to read this page", definitions()),
    ]


def _kind(told: Insight) -> str:
    routing = told.facts.get("config", {}).get("routing")
    told_by = f", {routing} routing" if routing else ""
    read = f"; routing measured on {told.read}" if told.read else ""
    return f"{told.facts['kind']}{told_by}: {told.facts['folder']}{read}"


def _lead(told: Insight) -> Html | None:
    said = [plan_words(told.plan)] if told.plan is not None else []
    if told.rank is not None:
        said.append(short_rank_words(told.rank, told.lora, told.equal_lora))
    return el("p", " ".join(said), cls="lead") if said else None


def _tiles(told: Insight) -> Html | None:
    tiles: list[tuple[str, str]] = []
    run = told.run
    if run is not None and run.metric in run.final:
        before = f", {shown(run.metric, run.before[run.metric])} before" if run.metric in run.before else ""
        tiles.append((shown(run.metric, run.final[run.metric]), f"{run.metric} on the {run.split} rows{before}"))
    if told.plan is not None:
        tiles.append((f"{told.plan.parameters.total:,}", "trained parameters"))
    if told.rank is not None:
        tiles.append((f"{told.rank.median():g}", "median numerical rank of a layer's update"))
    if told.lora is not None:
        tiles.append((f"{told.lora.median():g}", "the same of the LoRA trained beside it"))
    elif told.equal_lora is not None:
        tiles.append((f"{told.equal_lora}", "rank of LoRA with as many parameters"))
    tiles.append((f"{told.facts['bytes'] / 1e6:.2f} MB", "on disk"))
    return el("ul", *(el("li", el("b", value), el("span", said)) for value, said in tiles), cls="tiles")
