"""The data of a recipe as tables, for the terminal and the model card."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from lily.io import tables
from lily.recipes.data.summary import Summary


def print_data(summary: Summary, console: Console) -> None:
    """Print the tables, and what surely nobody means."""
    for header, lines in _tables(summary):
        if (names := tables.folded(header, lines, console.width)) is not None:
            console.print(tables.terminal(names, lines, numbers=True, no_wrap=True, box=None, pad_edge=False))
        else:
            for table in tables.fitting(header, lines, console.width, box=None, pad_edge=False):
                console.print(table)
    for fact in summary.facts():
        console.print(Text(fact), soft_wrap=True)
    for warning in summary.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def text(summary: Summary) -> str:
    """The same as plain text, for a log."""
    console = Console(file=io.StringIO(), width=120, color_system=None)
    with console.capture() as captured:
        print_data(summary, console)
    return captured.get().rstrip()


def markdown(summary: Summary) -> str:
    """The same as Markdown."""
    blocks = [tables.markdown(header, lines) for header, lines in _tables(summary)]
    listed = [f"- {line}" for line in (*summary.facts(), *(f"Warning: {text}." for text in summary.warnings))]
    return "\n\n".join([*blocks, *(["\n".join(listed)] if listed else [])])


def _tables(summary: Summary) -> Iterator[tuple[list[str], list[list[str]]]]:
    yield summary.rows()
    if (classes := summary.classes()) is not None:
        yield classes
