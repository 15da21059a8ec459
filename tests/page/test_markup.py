"""Markup and charts: text is escaped, pictures are named, scales are right."""

from __future__ import annotations

import pytest

from lily.page import charts
from lily.page.charts import Frame, Series
from lily.page.markup import Html, el, join, table

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
