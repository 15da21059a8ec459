"""What several sections draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lily.html import charts
from lily.html.charts import Series
from lily.html.markup import Html, figure, join, table


def curve_figure(title: str, picture: Html, series: Sequence[Series], said: str, x: str) -> Html:
    """Curves with their legend and numbers."""
    xs = sorted({px for s in series for px, _ in s.points})
    found = [dict(s.points) for s in series]
    rows = [[f"{px:g}", *("-" if f.get(px) is None else f"{f[px]:.4g}" for f in found)] for px in xs]
    numbers = table(title, [x, *(s.name for s in series)], rows)
    return figure(title, join(picture, charts.legend([(s.style, s.name) for s in series])), said, numbers)


def label(group: str, groups: Iterable[str]) -> str:
    """A group's name, with its shape only where another has the same name."""
    name = group.partition(" (")[0]
    return name if sum(g.partition(" (")[0] == name for g in groups) == 1 else group
