"""A page as values: text, tables and figures. The templates beside this file turn them into one escaped HTML file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lily._version import __version__
from lily.html.charts import DEPTH_COLORS, EXPERT_COLORS, Chart, Series


@dataclass(frozen=True)
class Table:
    """A table of text whose first column names the row."""

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers_from: int = 1  # columns from this index on are aligned right
    last_bold: bool = False


@dataclass(frozen=True)
class Legend:
    """What the marks of a chart stand for."""

    kind: ClassVar[str] = "legend"
    entries: Sequence[tuple[str, str]]  # (style, name)
    shape: str = "line"  # or `dot`, `box`, `depth`: the ramp of `charts.depth_style`, named at its first and last entry


@dataclass(frozen=True)
class Figure:
    """A chart with its title, legend, caption and numbers; a wide one scrolls in a narrow window."""

    kind: ClassVar[str] = "figure"
    title: str
    chart: Chart | None
    caption: str
    table: Table | None = None
    legend: Legend | None = None
    wide: bool = False


@dataclass(frozen=True)
class Grid:
    """Figures side by side where there is room."""

    kind: ClassVar[str] = "grid"
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Panel:
    """A small chart of several of one kind, with its title and what it shows in words."""

    title: str
    chart: Chart
    words: str = ""


@dataclass(frozen=True)
class Multiples:
    """Small charts of one kind in one figure, with their legend, caption and numbers."""

    kind: ClassVar[str] = "multiples"
    title: str
    panels: Sequence[Panel]
    caption: str
    tables: Sequence[Table] = ()
    legend: Legend | None = None


@dataclass(frozen=True)
class Case:
    """Texts that belong to one example, each with its name (which may be empty)."""

    title: str
    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cases:
    """Examples in full, one below the other; texts keep their line breaks."""

    kind: ClassVar[str] = "cases"
    cases: Sequence[Case]


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Terms:
    """Terms with their explanations."""

    kind: ClassVar[str] = "terms"
    pairs: Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Details:
    """Content that a reader can fold and unfold."""

    kind: ClassVar[str] = "details"
    summary: str
    content: Table | Terms | Cases
    open: bool = False


# a string is a paragraph
Block = str | Table | Legend | Figure | Multiples | Grid | Cases | Heading | Terms | Details


@dataclass(frozen=True)
class Section:
    """A part of the page; one without content is left out."""

    id: str
    title: str
    content: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page, with links to its sections at the top."""

    title: str  # of the browser's window
    heading: str
    subtitle: str
    sections: Sequence[Section]
    lead: str = ""  # the result in a sentence or two
    tiles: Sequence[tuple[str, str]] = ()  # (value, what it is), in large type
    notes: Sequence[str] = ()  # warnings

    def render(self) -> str:
        """One self-contained HTML file: no script, no network."""
        sections = [section for section in self.sections if section.content]
        return _environment().get_template("page.html.j2").render(page=self, sections=sections, version=__version__)


@cache
def _environment() -> Environment:
    """Every value is escaped, and a name that is not defined is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(depth_colors=DEPTH_COLORS, expert_colors=EXPERT_COLORS)
    return environment


def curve_figure(chart: Chart | None, series: Sequence[Series], x: str) -> Figure:
    """A chart of curves with its legend and numbers; `x` names the first column."""
    assert chart is not None, "a curve without values has no figure"
    xs = sorted({px for s in series for px, _ in s.points})
    curves = [dict(s.points) for s in series]
    rows = [[f"{px:g}", *("-" if c.get(px) is None else f"{c[px]:.4g}" for c in curves)] for px in xs]
    numbers = Table(chart.title, [x, *(s.name for s in series)], rows)
    return Figure(chart.title, chart, chart.description, numbers, Legend([(s.style, s.name) for s in series]))
