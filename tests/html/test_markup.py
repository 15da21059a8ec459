"""Markup and charts: text is escaped, pictures are named, scales are right."""

from __future__ import annotations

import re

import pytest

from lily.html import charts
from lily.html.charts import Frame, Series
from lily.html.markup import Html, el, join, table
from lily.html.style import CSS, DARK, LIGHT

EVIL = "</style><script>alert(1)</script>\"'&"


def test_text_and_attributes_are_escaped_and_markup_is_not():
    made = el("p", EVIL, el("b", "x"), title=EVIL, cls="k", aria_label="a", hidden=False)
    assert "<script" not in made
    assert made.count("&lt;script&gt;") == 2
    assert "<b>x</b>" in made
    assert 'class="k"' in made
    assert "hidden" not in made
    assert join(EVIL, Html("<i>")).endswith("<i>")


def test_a_tables_cells_are_escaped_and_its_headers_have_scopes():
    made = table(EVIL, ["a", EVIL], [[EVIL, el("b", "1")]])
    assert "<script" not in made
    assert made.count('scope="col"') == 2
    assert made.count('scope="row"') == 1


def test_a_logarithmic_scale_puts_decades_at_equal_distances():
    frame = Frame(400, 200, (0, 1), (0.01, 1.0), log=True)
    at = [frame.at_y(v) for v in (0.01, 0.1, 1.0, 0.0001)]
    assert at[0] - at[1] == pytest.approx(at[1] - at[2])
    assert at[3] == pytest.approx(at[0])  # below the scale: on its end


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.87, 0.89), (0, 48), (-2, 3), (0, 1e-4), (5, 5)])
def test_ticks_are_few_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in found)


def test_where_all_values_are_at_whole_numbers_no_others_are_on_the_axis():
    def marks(*xs):
        made = charts.lines([Series("s", "lily", tuple((x, 1.0 + x) for x in xs))], "t", "d", "x", "y", y=(0, 9))
        return re.findall(r'y="232" class="tick" text-anchor="middle">([^<]*)<', made)

    assert marks(1, 2, 3, 4) == ["1", "2", "3", "4"]
    assert marks(0.0, 0.5, 2.0) == ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5", "1.75", "2"]


def test_every_chart_has_a_role_a_name_and_a_description():
    pictures = [
        charts.lines([Series("s", "lily", ((1, 2.0), (2, None), (3, 1.0)))], EVIL, EVIL, "x", "y"),
        charts.by_layer([("g", ["0", "1"])], [("s", "lora", [1.0, None])], EVIL, EVIL, "y"),
        charts.sharing(EVIL, ["0", "1"], [(0, 2)], None, 2, EVIL),
        charts.heat_map([EVIL], ["0"], [[0.5]], EVIL, EVIL, "layer", 1.0),
    ]
    for picture in pictures:
        assert picture.startswith("<svg")
        assert 'role="img"' in picture
        assert "<title" in picture
        assert "<desc" in picture
        assert "<script" not in picture
        assert "nan" not in picture.lower()


def test_curves_without_values_are_no_picture():
    assert charts.lines([Series("s", "lily", ())], "t", "d", "x", "y") == ""


def test_a_heat_map_has_a_key_of_its_shades_however_narrow_its_cells_are():
    for layers in (3, 15, 48):
        names = [str(i) for i in range(layers)]
        made = charts.heat_map(["B0"], names, [[0.2] * layers], "t", "d", "layer", 0.8)
        cells = re.findall(r'<rect[^>]*style="fill-opacity:([\d.]+)"', made)
        assert len(cells) == layers + 5
        assert [float(c) for c in cells[-5:]] == pytest.approx([charts.SHADE * i / 4 for i in range(5)], abs=1e-3)
        assert float(cells[0]) == pytest.approx(float(cells[-4]))  # 0.2 of 0.8 is the second shade
        for value in ("0.00", "0.20", "0.40", "0.60", "0.80"):
            assert f">{value}</text>" in made


@pytest.mark.parametrize("layers", [9, 12, 32, 80])
def test_many_layers_are_coloured_by_depth_over_the_whole_ramp(layers):
    numbers = [int(charts.depth_style(i, layers).removeprefix("d")) for i in range(layers)]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (0, charts.DEPTH_COLOURS - 1)
    assert len(set(numbers)) == min(layers, charts.DEPTH_COLOURS)
    key = charts.depth_key("layer 0", "layer <31>")
    assert [int(n) for n in re.findall(r"step d(\d+)", key)] == list(range(charts.DEPTH_COLOURS))
    assert "layer &lt;31&gt;" in key


def luminance(colour):
    """Relative luminance, as WCAG defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_stand_out_from_their_ground(colours):
    lines = ["lily", "union", "lora", *(f"l{i}" for i in range(charts.EXPERT_COLOURS))]
    lines += [f"d{i}" for i in range(charts.DEPTH_COLOURS)]
    for name in lines:
        assert f".curve.{name}," in CSS
        low, high = sorted((luminance(colours[name]), luminance(colours["panel"])))
        assert (high + 0.05) / (low + 0.05) >= 3, name
