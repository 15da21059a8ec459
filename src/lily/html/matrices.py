"""Charts of matrices: cells shaded by value, for expert weights and for confused classes."""

from __future__ import annotations

from collections.abc import Sequence

from lily.html.charts import LEFT, RIGHT, WIDTH, Chart, Mark, layer_axis, rect, text

SHADE = 0.62  # opacity of the darkest cell, on which text is still readable


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    title: str,
    description: str,
    x_label: str,
    top: float,
    width: float = WIDTH,
) -> Chart:
    """Cells shaded by value, from 0 to `top`, with the value in them where it fits, and a key of the shades.

    `rows` and `columns` are names, `values` has the shape (rows, columns).
    """
    slot, height = (width - LEFT - RIGHT) / max(1, len(columns)), 24.0
    marks = []
    for i, row in enumerate(rows):
        y = 6 + height * i
        marks.append(text(LEFT - 8, y + 16, row, anchor="end"))
        for j, column in enumerate(columns):
            value = values[i][j]
            share, tip = value / top if top else 0.0, f"{row}, {x_label} {column}: {value:.3f}"
            marks.append(_cell(LEFT + slot * j, y, slot, height, share, tip))
            if slot > 26:
                marks.append(text(LEFT + slot * (j + 0.5), y + 16, f"{value:.2f}".lstrip("0"), "incell"))
    base = 6 + height * len(rows)
    marks += [*layer_axis(columns, slot, base + 14, x_label), text(LEFT - 8, base + 56, "shade", "label", "end")]
    key, shares = 40.0, [i / 4 for i in range(5)]
    marks += [_cell(LEFT + key * i, base + 44, key, 16, share) for i, share in enumerate(shares)]
    marks += [text(LEFT + key * (i + 0.5), base + 74, f"{share * top:.2f}") for i, share in enumerate(shares)]
    return Chart(width, base + 84, title, description, marks)


def confusion(names: Sequence[str], counts: Sequence[Sequence[int]], title: str, description: str) -> Chart:
    """Rows by expected class (down) and predicted class (across), shaded by their share of the expected class.

    Right ones have another color than wrong ones. `counts` has the shape (expected, predicted).
    """
    short = [_shortened(name) for name in names]
    left = 34 + 6.6 * max(map(len, short), default=0)
    slot = max(24.0, min(64.0, 420 / max(1, len(names))), 7.4 * max(len(f"{max(map(max, counts), default=0):,}"), 3))
    height, rotated = 26.0, slot < 7 * max(map(len, short), default=0)
    top = 30 + (6 * max(map(len, short), default=0) if rotated else 14)
    middle = left + slot * len(names) / 2
    base = top + height * len(names)
    marks = [text(middle, 16, "predicted", "label")]
    marks.append(text(12, (top + base) / 2, "expected", "label", transform=f"rotate(-90 12 {(top + base) / 2:.1f})"))
    for j, name in enumerate(short):
        x = left + slot * (j + 0.5)
        turn = {"transform": f"rotate(-60 {x + 4:.1f} {top - 8:.1f})"} if rotated else {}
        marks.append(text(x + 4 * rotated, top - 8, name, anchor="start" if rotated else "middle", **turn))
    for i, line in enumerate(counts):
        y, total = top + height * i, sum(line)
        marks.append(text(left - 8, y + 17, short[i], anchor="end"))
        for j, count in enumerate(line):
            share = count / total if total else 0.0
            tip = f"{names[i]}, predicted {names[j]}: {count:,} of {total:,} ({share:.1%})"
            marks.append(_cell(left + slot * j, y, slot, height, share, tip, "" if i == j else " wrong"))
            if count:
                marks.append(text(left + slot * (j + 0.5), y + 17, f"{count:,}", "incell"))
    slanted = 0.5 * 6.6 * len(short[-1]) if rotated and short else 0.0
    return Chart(left + slot * len(names) + max(12.0, slanted), base + 10, title, description, marks)


def _shortened(name: str, most: int = 18) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}\u2026"


def _cell(x: float, y: float, width: float, height: float, share: float, tip: str = "", style: str = "") -> Mark:
    """A cell, shaded by its share of the largest value."""
    opacity = f"fill-opacity:{SHADE * max(0.0, min(1.0, share)):.3f}"
    gap = min(1.0, width / 8)
    return rect(x + gap, y + 1, width - 2 * gap, height - 2, f"cell{style}", tip, style=opacity)
