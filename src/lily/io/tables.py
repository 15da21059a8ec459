"""Tables of text, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any

from rich.cells import cell_len
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


def folded(header: Sequence[str], rows: Rows, width: int) -> list[str] | None:
    """Names of columns on as few lines as let a table without a box fit into `width` characters; None: it does not."""
    lines = list(rows)
    for most in range(1, max(len(name.split()) for name in header) + 1):
        names = [_folded(name, most) for name in header]
        columns = [[*name.split("\n"), *(line[i] for line in lines)] for i, name in enumerate(names)]
        if sum(max(map(cell_len, column)) + 2 for column in columns) <= width:
            return names
    return None


def _folded(name: str, most: int) -> str:
    """A name on at most `most` lines, none longer than it must be."""
    least = max(map(len, name.split()), default=1)
    return next(("\n".join(lines) for w in range(least, len(name)) if len(lines := wrap(name, w)) <= most), name)


def fitting(
    header: Sequence[str],
    rows: Rows,
    width: int,
    *,
    title: str | None = None,
    numbers: bool = True,
    **options: Any,
) -> list[Table]:
    """A table for the terminal without a cut or wrapped cell: several below one another where it is wider.

    Each has the first column, which names the row, and as many of the others as fit into `width` characters; the first
    has the title. `numbers` and `options` are as in `terminal`.
    """
    lines = [list(row) for row in rows]
    edges = [max(cell_len(line[i]) for line in (header, *lines)) + 3 for i in range(len(header))]
    parts: list[list[int]] = [[0]]
    for i in range(1, len(header)):
        if len(parts[-1]) > 1 and sum(edges[k] for k in (*parts[-1], i)) + 1 > width:
            parts.append([0])
        parts[-1].append(i)
    return [
        terminal(
            [header[i] for i in part],
            [[line[i] for i in part] for line in lines],
            numbers=numbers,
            no_wrap=True,
            title=title if number == 0 else None,
            title_justify="left",
            **options,
        )
        for number, part in enumerate(parts)
    ]
