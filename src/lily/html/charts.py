"""Charts as SVG. Colours are the page's (CSS variables), so that they follow light, dark and print.

Every chart has a title and a description for those who do not see it, axis labels with units, and a legend. Marks have
a `<title>`, which browsers show as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from lily.html.markup import Html, el, join

EXPERT_COLOURS = 8  # --e0 to --e7 of the style
DEPTH_COLOURS = 12  # --d0 to --d11, a ramp from the first layer to the last
SHADE = 0.62  # opacity of a heat map's darkest cell, on which text can still be read


@dataclass(frozen=True)
class Series:
    """Values to draw.

    Attributes:
        name: for the legend.
        style: class of the style: `lily`, `union`, `lora`, `e0` to `e7`, `l0` to `l7`, `d0` to `d11`.
        points: (x, y); a gap where y is None.
        band: (x, low, high) to shade, or nothing.
    """

    name: str
    style: str
    points: tuple[tuple[float, float | None], ...]
    band: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Frame:
    """The plotting area of a chart, and its scales."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    left: float = 60  # a label on its side, and numbers such as 0.0025
    right: float = 12
    top: float = 12
    bottom: float = 44

    def at_x(self, value: float) -> float:
        """Horizontal place."""
        low, high = self.x
        return self.left + (value - low) / ((high - low) or 1) * (self.width - self.left - self.right)

    def at_y(self, value: float) -> float:
        """Vertical place; values below a logarithmic scale lie on its end."""
        low, high = self.y
        if self.log:
            low, high, value = (math.log10(max(v, self.y[0])) for v in (low, high, value))
        share = (value - low) / ((high - low) or 1)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def svg(width: float, height: float, title: str, description: str, *content: Html) -> Html:
    """A picture with a name and a description."""
    number = f"{crc32(f'{title}|{description}'.encode()):08x}"
    names = f"t-{number}", f"d-{number}"
    return el(
        "svg",
        el("title", title, id=names[0]),
        el("desc", description, id=names[1]),
        *content,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=" ".join(names),
        style=f"max-width:{1.25 * width:g}px",
    )


def text(x: float, y: float, said: str, cls: str = "tick", anchor: str = "middle", **more: object) -> Html:
    """Text at a place."""
    return el("text", said, x=_n(x), y=_n(y), cls=cls, text_anchor=anchor, **more)


def line(x1: float, y1: float, x2: float, y2: float, cls: str) -> Html:
    """A straight line."""
    return el("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), cls=cls)


def rect(x: float, y: float, width: float, height: float, cls: str, tip: str | None = None, **more: object) -> Html:
    """A rectangle, with a tooltip."""
    inner = None if tip is None else el("title", tip)
    return el("rect", inner, x=_n(x), y=_n(y), width=_n(max(0.0, width)), height=_n(max(0.0, height)), cls=cls, **more)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def axes(frame: Frame, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]] | None = None) -> Html:
    """Grid, tick labels and axis labels."""
    if frame.log:
        decades = range(math.ceil(math.log10(frame.y[0]) - 1e-9), math.floor(math.log10(frame.y[1]) + 1e-9) + 1)
        levels = [10.0**d for d in decades]
    else:
        levels = ticks(*frame.y)
    end = frame.width - frame.right
    out = []
    for level in levels:
        y = frame.at_y(level)
        out += [line(frame.left, y, end, y, "grid"), text(frame.left - 6, y + 4, f"{level:g}", anchor="end")]
    marks = [(v, f"{v:g}") for v in ticks(*frame.x, most=8)] if x_ticks is None else x_ticks
    base = frame.height - frame.bottom
    out += [text(frame.at_x(value), base + 16, said) for value, said in marks]
    out.append(line(frame.left, base, end, base, "axis"))
    out.append(text((frame.left + end) / 2, frame.height - 8, x_label, "label"))
    middle = (frame.top + base) / 2
    out.append(text(12, middle, y_label, "label", transform=f"rotate(-90 12 {_n(middle)})"))
    return join(*out)


def legend(entries: Sequence[tuple[str, str]], kind: str = "line") -> Html:
    """A legend beside the picture, as a list: (style, name).

    Args:
        entries: what is drawn.
        kind: `line`, `dot` or `box`: what the marks look like.
    """
    items = [el("li", el("span", cls=f"key {kind} {style}", aria_hidden="true"), name) for style, name in entries]
    return el("ul", *items, cls="legend")


def depth_style(index: int, layers: int) -> str:
    """The colour of one of many layers, by its depth."""
    return f"d{round(index * (DEPTH_COLOURS - 1) / max(1, layers - 1))}"


def depth_key(first: str, last: str) -> Html:
    """The ramp of `depth_style`, from the first layer's name to the last one's."""
    colours = (el("span", cls=f"key step d{i}") for i in range(DEPTH_COLOURS))
    ramp = el("span", *colours, cls="steps", aria_hidden="true")
    return el("ul", el("li", f"by depth: {first}", ramp, f"to {last}"), cls="legend")


def lines(
    series: Sequence[Series],
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    *,
    y: tuple[float, float] | None = None,
    log: bool = False,
    level: tuple[float, str] | None = None,
    size: tuple[float, float] = (460, 260),
) -> Html:
    """Curves.

    Args:
        series: the curves; a band is shaded behind its own.
        title: for those who do not see it.
        description: likewise: what it shows.
        x_label: with its unit.
        y_label: with its unit.
        y: range; default: that of the values.
        log: logarithmic y.
        level: a horizontal line and what it is.
        size: in units of the picture.
    """
    xs = [px for s in series for px, _ in s.points]
    values = [py for s in series for _, py in s.points if py is not None]
    if not values:
        return Html("")
    span = y or _padded(min(values), max(values))
    frame = Frame(*size, (min(xs), max(xs)), span, log)
    whole = all(px == int(px) for px in xs)  # there is no direction 1.5
    marks = [(v, f"{v:g}") for v in ticks(*frame.x, most=8) if v == int(v) or not whole]
    content = [axes(frame, x_label, y_label, marks)]
    if level is not None:
        at = frame.at_y(level[0])
        content += [
            line(frame.left, at, frame.width - frame.right, at, "level"),
            text(frame.width - frame.right, at - 5, level[1], anchor="end"),
        ]
    for s in series:
        if s.band:
            top = [(frame.at_x(px), frame.at_y(high)) for px, _, high in s.band]
            below = [(frame.at_x(px), frame.at_y(low)) for px, low, _ in reversed(s.band)]
            shape = " ".join(f"{_n(a)},{_n(b)}" for a, b in [*top, *below])
            content.append(el("polygon", points=shape, cls=f"band {s.style}"))
    for s in series:
        places = [(frame.at_x(px), frame.at_y(py)) for px, py in s.points if py is not None]
        points = " ".join(f"{_n(a)},{_n(b)}" for a, b in places)
        content.append(el("polyline", el("title", s.name), points=points, cls=f"curve {s.style}"))
        if len(places) <= 30:
            content += [
                el(
                    "circle",
                    el("title", f"{s.name}: {py:.4g} at {px:g}"),
                    cx=_n(a),
                    cy=_n(b),
                    r="3",
                    cls=f"mark {s.style}",
                )
                for (a, b), (px, py) in zip(places, [p for p in s.points if p[1] is not None], strict=True)
            ]
    return svg(*size, title, description, *content)


def _padded(low: float, high: float) -> tuple[float, float]:
    space = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return (0.0 if low >= 0 and low - space < 0 else low - space), high + space


def dot(x: float, y: float, tip: str, cls: str) -> Html:
    """A round mark; a ring that one of another kind at the same place can be seen in."""
    return el("circle", el("title", tip), cx=_n(x), cy=_n(y), r="6" if cls == "union" else "4", cls=f"mark {cls}")


def diamond(x: float, y: float, tip: str, cls: str) -> Html:
    """A square one, on its corner."""
    shape = f"{_n(x)},{_n(y - 5)} {_n(x + 5)},{_n(y)} {_n(x)},{_n(y + 5)} {_n(x - 5)},{_n(y)}"
    return el("polygon", el("title", tip), points=shape, cls=f"mark {cls}")


@dataclass(frozen=True)
class Point:
    """A place in a scatter plot.

    Attributes:
        name: written beside it.
        style: class of the style.
        x: its place.
        y: likewise.
        low: of a vertical bar through it.
        high: likewise.
    """

    name: str
    style: str
    x: float
    y: float
    low: float
    high: float


def scatter(
    points: Sequence[Point],
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    *,
    size: tuple[float, float] = (460, 280),
) -> Html:
    """Named points with bars of spread; x begins at zero, so that costs which hardly differ are seen to.

    Args:
        points: what to draw.
        title: for those who do not see it.
        description: likewise: what it shows.
        x_label: with its unit.
        y_label: with its unit.
        size: in units of the picture.
    """
    span = _padded(min(p.low for p in points), max(p.high for p in points))
    frame = Frame(*size, (0.0, max(p.x for p in points) * 1.08 or 1.0), span, right=18)
    content = [axes(frame, x_label, y_label)]
    below = frame.top
    for p in sorted(points, key=lambda p: -p.y):
        x, y = frame.at_x(p.x), frame.at_y(p.y)
        tip = f"{p.name}: {p.y:.4g} ({p.low:.4g} to {p.high:.4g}) at {p.x:.6g}"
        if p.high > p.low:
            content.append(line(x, frame.at_y(p.low), x, frame.at_y(p.high), f"spread {p.style}"))
        content.append(dot(x, y, tip, p.style))
        below = max(y + 4, below + 13)  # names do not cover one another
        late = x > frame.width * 0.62
        content.append(text(x + (-9 if late else 9), below, p.name, "label", "end" if late else "start"))
    return svg(*size, title, description, *content)


def by_layer(
    groups: Sequence[tuple[str, Sequence[str]]],
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    title: str,
    description: str,
    y_label: str,
    *,
    stacked: bool = False,
) -> Html:
    """One column per layer, groups side by side.

    Args:
        groups: (name, short names of its layers), in the order of the values.
        series: (name, style, a value for each layer).
        title: for those who do not see it.
        description: likewise.
        y_label: with its unit.
        stacked: bars on top of each other instead of marks.
    """
    total = sum(len(layers) for _, layers in groups)
    columns = list(zip(*(values for _, _, values in series), strict=True))
    sums = [sum(v or 0.0 for v in column) for column in columns]
    highest = max(sums if stacked else [v or 0.0 for column in columns for v in column], default=0.0)
    width = 1060.0
    frame = Frame(width, 280, (-0.5, total - 0.5), (0, highest * 1.08 or 1.0), top=26)
    slot = (frame.width - frame.left - frame.right) / max(total, 1)
    every = max(1, math.ceil(16 / slot))
    names = [name for _, layers in groups for name in layers]
    marks = [(float(i), name) for i, name in enumerate(names) if i % every == 0]
    content = [axes(frame, "layer", y_label, marks)]
    start, base = 0, frame.height - frame.bottom
    for number, (group, layers) in enumerate(groups):
        left = frame.at_x(start - 0.5)
        if number:
            content.append(line(left, frame.top - 14, left, base + 22, "divider"))
        middle = frame.at_x(start + (len(layers) - 1) / 2)
        room = int(slot * len(layers) / 7)  # letters
        said = group if len(group) <= room else group[: max(1, room - 1)] + "\u2026"
        content.append(text(middle, frame.top - 8, said, "group"))
        start += len(layers)
    for i, column in enumerate(columns):
        top = base
        for (name, style, _), value in zip(series, column, strict=True):
            if value is None:
                continue
            tip = f"{name}, layer {names[i]}: {value:.4g}"
            if stacked:
                height = base - frame.at_y(value)
                top -= height
                content.append(rect(frame.at_x(i) - slot * 0.38, top, slot * 0.76, height, f"fill {style}", tip))
            else:
                draw = diamond if style == "lora" else dot
                content.append(draw(frame.at_x(i), frame.at_y(value), tip, style))
    return svg(width, frame.height, title, description, *content)


def sharing(
    group: str,
    layers: Sequence[str],
    blocks: Sequence[tuple[int, int]],
    weights: Sequence[Sequence[float]] | None,
    experts: int,
    description: str,
) -> Html:
    """Which layers share which A, and how each mixes the shared experts.

    Args:
        group: its name.
        layers: short names.
        blocks: (number of the A, layers that share it), in order.
        weights: mean expert weights of each layer, or None where they are not known.
        experts: how many B.
        description: for those who do not see it.
    """
    width, left, right = 460.0, 52.0, 12.0
    slot = (width - left - right) / max(1, len(layers))
    content = [text(left - 8, 27, "A", "label", "end"), text(left - 8, 100, "B", "label", "end")]
    at = left
    for index, (number, size) in enumerate(blocks):
        span = slot * size
        tip = f"A{number} is shared by {size} layers" if size > 1 else f"A{number} serves one layer"
        content.append(rect(at + 1.5, 10, span - 3, 26, f"block {'odd' if index % 2 else 'even'}", tip, rx="5"))
        if span > 22:
            content.append(text(at + span / 2, 27.5, f"A{number}", "inblock"))
        at += span
    top, height = 46.0, 104.0
    for i, name in enumerate(layers):
        x, y = left + slot * i + 1.5, top
        shares = weights[i] if weights is not None else [1 / experts] * experts
        for e, share in enumerate(shares):
            tip = f"layer {name}, expert B{e}" + (f": {share:.1%}" if weights is not None else ": decided by the data")
            style = f"fill e{e % EXPERT_COLOURS}" + ("" if weights is not None else " unknown")
            content.append(rect(x, y, slot - 3, height * share, style, tip))
            if slot > 30 and height * share > 15:
                said = f"{100 * share:.0f}%" if weights is not None else f"B{e}"
                content.append(text(x + (slot - 3) / 2, y + height * share / 2 + 4, said, "inband"))
            y += height * share
    every = max(1, math.ceil(16 / slot))
    content += [
        text(left + slot * (i + 0.5), top + height + 16, name) for i, name in enumerate(layers) if i % every == 0
    ]
    content.append(text((left + width - right) / 2, top + height + 34, "layer", "label"))
    return svg(width, top + height + 42, f"Sharing in {group}", description, *content)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    title: str,
    description: str,
    x_label: str,
    top: float,
) -> Html:
    """Cells shaded by value, from 0 to `top`, with the value in them where there is room, and a key of the shades.

    Args:
        rows: their names.
        columns: likewise.
        values: (rows, columns).
        title: for those who do not see it.
        description: likewise.
        x_label: of the columns.
        top: the value of the darkest shade.
    """
    width, left, right = 460.0, 52.0, 12.0
    slot, cell = (width - left - right) / max(1, len(columns)), 24.0
    content = []
    for i, row in enumerate(rows):
        y = 6 + cell * i
        content.append(text(left - 8, y + 16, row, anchor="end"))
        for j, column in enumerate(columns):
            value = values[i][j]
            tip = f"{row}, {x_label} {column}: {value:.3f}"
            content.append(_cell(left + slot * j, y, slot, cell, value / top if top else 0.0, tip))
            if slot > 26:
                content.append(text(left + slot * (j + 0.5), y + 16, f"{value:.2f}".lstrip("0"), "incell"))
    base = 6 + cell * len(rows)
    every = max(1, math.ceil(16 / slot))
    content += [text(left + slot * (j + 0.5), base + 14, name) for j, name in enumerate(columns) if j % every == 0]
    content.append(text((left + width - right) / 2, base + 32, x_label, "label"))
    content.append(_shades(left, base + 44, top))
    return svg(width, base + 84, title, description, *content)


def _cell(x: float, y: float, width: float, height: float, share: float, tip: str | None = None) -> Html:
    """A cell of a heat map, shaded by its share of the largest value."""
    style = f"fill-opacity:{SHADE * max(0.0, min(1.0, share)):.3f}"
    gap = min(1.0, width / 8)
    return rect(x + gap, y + 1, width - 2 * gap, height - 2, "cell", tip, style=style)


def _shades(x: float, y: float, top: float) -> Html:
    """What the shades of a heat map mean: five of them with their values."""
    slot, cell, steps = 40.0, 16.0, 5
    shares = [i / (steps - 1) for i in range(steps)]
    return join(
        text(x - 8, y + 12, "shade", "label", "end"),
        *(_cell(x + slot * i, y, slot, cell, share) for i, share in enumerate(shares)),
        *(text(x + slot * (i + 0.5), y + cell + 14, f"{share * top:.2f}") for i, share in enumerate(shares)),
    )
