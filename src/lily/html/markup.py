"""Markup that is escaped unless it was made here: what comes from a file can only ever become text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


class Html(str):
    """Markup, as opposed to text."""


Child = str | Html | None


def el(tag: str, *children: Child, **attributes: object) -> Html:
    """An element.

    Args:
        tag: its name, such as `td`.
        children: text, which is escaped, and markup, which is not; None is left out.
        attributes: names with `_` for `-` and `cls` for `class`; None and False are left out.
    """
    given = "".join(
        f' {"class" if name == "cls" else name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    inner = join(*children)
    return Html(f"<{tag}{given}>{inner}</{tag}>")


def join(*children: Child) -> Html:
    """Text and markup in a row, the text escaped."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None))


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Child]], numbers_from: int = 1) -> Html:
    """A table whose first column names the row.

    Args:
        caption: what it shows.
        header: of the columns.
        rows: cells.
        numbers_from: columns from this one on are set flush right.
    """

    def align(column: int) -> str | None:
        return "number" if column >= numbers_from else None

    head = el("tr", *(el("th", text, scope="col", cls=align(i)) for i, text in enumerate(header)))
    body = [
        el(
            "tr",
            *(el("th", cell, scope="row") if i == 0 else el("td", cell, cls=align(i)) for i, cell in enumerate(cells)),
        )
        for cells in rows
    ]
    made = el("table", el("caption", caption), el("thead", head), el("tbody", *body))
    return el("div", made, cls="scroll", tabindex="0", role="region", aria_label=caption)


def details(summary: str, *children: Child, **attributes: object) -> Html:
    """What is shown when it is asked for."""
    return el("details", el("summary", summary), *children, **attributes)


def figure(title: str, picture: Html, caption: Child, data: Html | None = None) -> Html:
    """A picture with its title, what to see in it, and its numbers as a table."""
    numbers = None if data is None else details("The numbers as a table", data)
    return el("figure", el("h3", title), picture, el("figcaption", caption), numbers)
