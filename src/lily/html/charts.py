"""Charts as values: marks with coordinates, which the templates turn into SVG.

The page of `lily inspect` must show tooltips and follow dark mode without matplotlib installed, so sharing, routers and
rank are drawn here as well as in `lily.analysis.plots`, both from the numbers of `lily.analysis.series`.

Colors are classes of the style sheet, so that charts follow light, dark and print. Every chart has a `title` and a
`description` for screen readers, and axis labels with units; browsers show the tip of a mark as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

EXPERT_COLORS = 8  # --e0 to --e7 of the style sheet
DEPTH_COLORS = 12  # --d0 to --d11, a ramp from the first layer to the last
WIDTH, LEFT, RIGHT = 460.0, 52.0, 12.0  # of charts with one column per layer, and the margins beside their columns
SMALL = 330.0  # width of a chart of several in one figure


@dataclass(frozen=True)
class Mark:
    """An SVG element: its tag, attributes, text and tooltip."""

    tag: str
    attributes: dict[str, object]
    text: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing with a name and a description; sizes in units of its coordinates."""

    width: float
    height: float
    title: str
    description: str
    marks: Sequence[Mark]

    @property
    def id(self) -> str:
        """For the names of its title and description in the page."""
        return f"{crc32(f'{self.title}|{self.description}'.encode()):08x}"


@dataclass(frozen=True)
class Series:
    """A curve."""

    name: str
    style: str  # class of the style sheet: `lily`, `union`, `lora`, `e0` to `e7`, `l0` to `l7`, `d0` to `d11`
    points: tuple[tuple[float, float | None], ...]  # (x, y); a gap where y is None
    band: tuple[tuple[float, float, float], ...] = ()  # (x, low, high) to shade


@dataclass(frozen=True)
class Frame:
    """The plotting area of a chart, and its scales."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    left: float = 60  # room for the rotated label and numbers such as 0.0025
    right: float = 12
    top: float = 12
    bottom: float = 44

    def at_x(self, value: float) -> float:
        """Horizontal coordinate."""
        low, high = self.x
        return self.left + (value - low) / ((high - low) or 1) * (self.width - self.left - self.right)

    def at_y(self, value: float) -> float:
        """Vertical coordinate; values below a logarithmic scale are drawn at its lower end."""
        low, high = self.y
        if self.log:
            low, high, value = (math.log10(max(v, self.y[0])) for v in (low, high, value))
        share = (value - low) / ((high - low) or 1)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def text(x: float, y: float, content: str, cls: str = "tick", anchor: str = "middle", **more: object) -> Mark:
    """Text at a point."""
    return Mark("text", {"x": _n(x), "y": _n(y), "class": cls, "text-anchor": anchor, **more}, content)


def line(x1: float, y1: float, x2: float, y2: float, cls: str) -> Mark:
    """A straight line."""
    return Mark("line", {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2), "class": cls})


def rect(x: float, y: float, width: float, height: float, cls: str, tip: str = "", **more: object) -> Mark:
    """A rectangle."""
    size = {"width": _n(max(0.0, width)), "height": _n(max(0.0, height))}
    return Mark("rect", {"x": _n(x), "y": _n(y), **size, "class": cls, **more}, tip=tip)


def dot(x: float, y: float, tip: str, cls: str, radius: str = "4") -> Mark:
    """A circle; `union` is a larger ring, so that a mark at the same point stays visible."""
    radius = "6" if cls == "union" else radius
    return Mark("circle", {"cx": _n(x), "cy": _n(y), "r": radius, "class": f"mark {cls}"}, tip=tip)


def diamond(x: float, y: float, tip: str, cls: str) -> Mark:
    """A square that stands on its corner."""
    return _path("polygon", [(x, y - 5), (x + 5, y), (x, y + 5), (x - 5, y)], f"mark {cls}", tip)


def _path(tag: str, points: Sequence[tuple[float, float]], cls: str, tip: str = "") -> Mark:
    return Mark(tag, {"points": " ".join(f"{_n(x)},{_n(y)}" for x, y in points), "class": cls}, tip=tip)


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


def axes(frame: Frame, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]] | None = None) -> list[Mark]:
    """Grid, tick labels and axis labels."""
    if frame.log:
        decades = range(math.ceil(math.log10(frame.y[0]) - 1e-9), math.floor(math.log10(frame.y[1]) + 1e-9) + 1)
        levels = [10.0**d for d in decades]
    else:
        levels = ticks(*frame.y)
    end, base = frame.width - frame.right, frame.height - frame.bottom
    out = []
    for level in levels:
        y = frame.at_y(level)
        out += [line(frame.left, y, end, y, "grid"), text(frame.left - 6, y + 4, f"{level:g}", anchor="end")]
    labels = [(v, f"{v:g}") for v in ticks(*frame.x, most=8)] if x_ticks is None else x_ticks
    out += [text(frame.at_x(value), base + 16, label) for value, label in labels]
    middle = (frame.top + base) / 2
    return [
        *out,
        line(frame.left, base, end, base, "axis"),
        text((frame.left + end) / 2, frame.height - 8, x_label, "label"),
        text(12, middle, y_label, "label", transform=f"rotate(-90 12 {_n(middle)})"),
    ]


def depth_style(index: int, layers: int) -> str:
    """The color of one of `layers` layers, by its depth."""
    return f"d{round(index * (DEPTH_COLORS - 1) / max(1, layers - 1))}"


def lines(
    series: Sequence[Series],
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    *,
    y: tuple[float, float] | None = None,
    log: bool = False,
    levels: Sequence[tuple[float, str]] = (),
    width: float = WIDTH,
) -> Chart | None:
    """Curves, each over its shaded band; None if there is no value to draw.

    `y` is the range of the axis (default: that of the values), `log` makes it logarithmic, and `levels` are horizontal
    lines with their names.
    """
    values = [py for s in series for _, py in s.points if py is not None]
    if not values:
        return None
    xs = [px for s in series for px, _ in s.points]
    values += [value for value, _ in levels]
    frame = Frame(width, 260, (min(xs), max(xs)), y or _padded(min(values), max(values)), log)
    whole = all(px == int(px) for px in xs)  # there is no direction 1.5
    most = 8 if width >= WIDTH else 5
    labels = [(v, f"{v:g}") for v in ticks(*frame.x, most=most) if v == int(v) or not whole]
    marks = axes(frame, x_label, y_label, labels)
    names, label_y = [], frame.height
    for value, name in sorted(levels):
        at, end = frame.at_y(value), frame.width - frame.right
        label_y = min(at - 5, label_y - 13)  # names do not cover one another
        marks.append(line(frame.left, at, end, at, "level"))
        names.append(text(end, label_y, name, "tick over", anchor="end"))
    for s in series:
        if s.band:
            top = [(frame.at_x(px), frame.at_y(high)) for px, _, high in s.band]
            bottom = [(frame.at_x(px), frame.at_y(low)) for px, low, _ in reversed(s.band)]
            marks.append(_path("polygon", [*top, *bottom], f"band {s.style}"))
    for s in series:
        points = [(frame.at_x(px), frame.at_y(py), f"{py:.4g} at {px:g}") for px, py in s.points if py is not None]
        marks.append(_path("polyline", [(x, y) for x, y, _ in points], f"curve {s.style}", s.name))
        if len(points) <= 30:
            marks += [dot(x, at, f"{s.name}: {tip}", s.style, "3") for x, at, tip in points]
    marks += names
    return Chart(frame.width, frame.height, title, description, marks)


def _padded(low: float, high: float) -> tuple[float, float]:
    space = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return (0.0 if low >= 0 and low - space < 0 else low - space), high + space


@dataclass(frozen=True)
class Point:
    """A named point of a scatter plot, with a vertical bar from `low` to `high` through it."""

    name: str
    style: str
    x: float
    y: float
    low: float
    high: float


def scatter(points: Sequence[Point], title: str, description: str, x_label: str, y_label: str) -> Chart:
    """Named points with bars of spread; x starts at zero, so that small differences of cost look small."""
    span = _padded(min(p.low for p in points), max(p.high for p in points))
    frame = Frame(WIDTH, 280, (0.0, max(p.x for p in points) * 1.08 or 1.0), span, right=18)
    marks = axes(frame, x_label, y_label)
    label_y = frame.top
    for p in sorted(points, key=lambda p: -p.y):
        x, y = frame.at_x(p.x), frame.at_y(p.y)
        if p.high > p.low:
            marks.append(line(x, frame.at_y(p.low), x, frame.at_y(p.high), f"spread {p.style}"))
        marks.append(dot(x, y, f"{p.name}: {p.y:.4g} ({p.low:.4g} to {p.high:.4g}) at {p.x:.6g}", p.style))
        label_y = max(y + 4, label_y + 13)  # names do not cover one another
        late = x > frame.width * 0.62
        marks.append(text(x + (-9 if late else 9), label_y, p.name, "label", "end" if late else "start"))
    return Chart(frame.width, frame.height, title, description, marks)


def by_layer(
    groups: Sequence[tuple[str, Sequence[str]]],
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    title: str,
    description: str,
    y_label: str,
    *,
    stacked: bool = False,
) -> Chart:
    """One column per layer, groups side by side, with marks or stacked bars.

    `groups` are (name, short names of its layers), in the order of the values; `series` (name, style, one value per
    layer).
    """
    columns = list(zip(*(values for _, _, values in series), strict=True))
    heights = [sum(v or 0.0 for v in c) if stacked else max((v or 0.0 for v in c), default=0.0) for c in columns]
    names = [name for _, layers in groups for name in layers]
    frame = Frame(1060, 280, (-0.5, len(names) - 0.5), (0, max(heights, default=0.0) * 1.08 or 1.0), top=26)
    slot = (frame.width - frame.left - frame.right) / max(len(names), 1)
    base = frame.height - frame.bottom
    marks = axes(frame, "layer", y_label, [(float(i), name) for i, name in _spaced(names, slot)])
    start = 0
    for number, (group, layers) in enumerate(groups):
        left = frame.at_x(start - 0.5)
        if number:
            marks.append(line(left, frame.top - 14, left, base + 22, "divider"))
        room = int(slot * len(layers) / 7)  # letters
        label = group if len(group) <= room else group[: max(1, room - 1)] + "\u2026"
        marks.append(text(frame.at_x(start + (len(layers) - 1) / 2), frame.top - 8, label, "group"))
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
                marks.append(rect(frame.at_x(i) - slot * 0.38, top, slot * 0.76, height, f"fill {style}", tip))
            else:
                draw = diamond if style == "lora" else dot
                marks.append(draw(frame.at_x(i), frame.at_y(value), tip, style))
    return Chart(frame.width, frame.height, title, description, marks)


def _spaced(names: Sequence[str], slot: float) -> list[tuple[int, str]]:
    """The names, with their indices, that fit side by side at `slot` units per name."""
    return list(enumerate(names))[:: max(1, math.ceil(16 / slot))]


def layer_axis(names: Sequence[str], slot: float, y: float, label: str) -> list[Mark]:
    """The names of columns of `slot` units below a chart, and what they are."""
    labels = [text(LEFT + slot * (i + 0.5), y, name) for i, name in _spaced(names, slot)]
    return [*labels, text(LEFT + slot * len(names) / 2, y + 18, label, "label")]


def sharing(
    group: str,
    layers: Sequence[str],
    blocks: Sequence[tuple[int, int]],
    weights: Sequence[Sequence[float]] | None,
    experts: int,
    description: str,
    width: float = WIDTH,
) -> Chart:
    """Which layers of a group share which A, and how each mixes the shared experts.

    `blocks` are (number of the A, number of layers that share it), in order; `weights` the mean expert weights of each
    layer, None if unknown.
    """
    slot = (width - LEFT - RIGHT) / max(1, len(layers))
    marks = [text(LEFT - 8, 27, "A", "label", "end"), text(LEFT - 8, 100, "B", "label", "end")]
    at = LEFT
    for index, (number, size) in enumerate(blocks):
        span = slot * size
        tip = f"A{number} is shared by {size} layers" if size > 1 else f"A{number} serves one layer"
        marks.append(rect(at + 1.5, 10, span - 3, 26, f"block {'odd' if index % 2 else 'even'}", tip, rx="5"))
        if span > 22:
            marks.append(text(at + span / 2, 27.5, f"A{number}", "inblock"))
        at += span
    top, height = 46.0, 104.0
    for i, name in enumerate(layers):
        x, y = LEFT + slot * i + 1.5, top
        for e, share in enumerate([1 / experts] * experts if weights is None else weights[i]):
            tip, label, style = f"layer {name}, expert B{e}", f"B{e}", f"fill e{e % EXPERT_COLORS}"
            if weights is None:
                tip, style = f"{tip}: depends on the data", f"{style} unknown"
            else:
                tip, label = f"{tip}: {share:.1%}", f"{100 * share:.0f}%"
            marks.append(rect(x, y, slot - 3, height * share, style, tip))
            if slot > 30 and height * share > 15:
                marks.append(text(x + (slot - 3) / 2, y + height * share / 2 + 4, label, "inband"))
            y += height * share
    marks += layer_axis(layers, slot, top + height + 16, "layer")
    return Chart(width, top + height + 42, f"Sharing in {group}", description, marks)
