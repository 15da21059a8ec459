"""Tables of text, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

Rows = Iterable[Sequence[str]]


def markdown(header: Sequence[str], rows: Rows) -> str:
    """A Markdown table."""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def terminal(
    header: Sequence[str], rows: Rows, *, numbers: bool = False, no_wrap: bool = False, **options: Any
) -> Table:
    """A table for the terminal, in which brackets are no markup.

    Args:
        header: names of the columns.
        rows: cells.
        numbers: align all columns but the first to the right.
        no_wrap: keep the first column on one line.
        options: of `rich.table.Table`; a title's brackets are markup.
    """
    table = Table(**options)
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="right" if numbers and i else "left", no_wrap=no_wrap and not i)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
