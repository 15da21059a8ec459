"""Pages and charts: every string is escaped, pictures are named, scales are right."""

from __future__ import annotations

import re

import pytest
from jinja2 import UndefinedError

from lily.html import charts, matrices
from lily.html.charts import Chart, Frame, Point, Series
from lily.html.page import (
    Case,
    Cases,
    Details,
    Figure,
    Grid,
    Heading,
    Legend,
    Multiples,
    Page,
    Panel,
    Section,
    Table,
    Terms,
    _environment,
    curve_figure,
)  # fmt: skip

EVIL = "</style><script>alert(1)</script>\"'&"
SAFE = "&lt;/style&gt;&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;"


def rendered(*content):
    """A page of one section with this content."""
    return Page("title", "heading", "subtitle", [Section("s", "section", content)]).render()


def drawn(chart):
    """The SVG of a chart, as the page has it."""
    return re.search(r"<svg.*</svg>", rendered(Figure("f", chart, "c")), re.DOTALL)[0]


def evil_charts():
    curve = [Series(EVIL, "lily", ((1, 2.0), (2, None), (3, 1.0)), ((1, 1.0, 2.0), (3, 0.5, 2.0)))]
    return [
        charts.lines(curve, EVIL, EVIL, EVIL, EVIL, levels=[(1.5, EVIL)]),
        charts.scatter([Point(EVIL, "l0", 1.0, 2.0, 1.0, 3.0)], EVIL, EVIL, EVIL, EVIL),
        charts.by_layer([(EVIL, ["0", EVIL])], [(EVIL, "lora", [1.0, None])], EVIL, EVIL, EVIL),
        charts.by_layer([(EVIL, ["0", EVIL])], [(EVIL, "e0", [1.0, 2.0])], EVIL, EVIL, EVIL, stacked=True),
        charts.sharing(EVIL, ["0", EVIL], [(0, 2)], None, 2, EVIL),
        charts.sharing(EVIL, ["0", EVIL], [(0, 1), (1, 1)], [(0.5, 0.5), (0.1, 0.9)], 2, EVIL),
        matrices.heat_map([EVIL], [EVIL], [[0.5]], EVIL, EVIL, EVIL, 1.0),
        matrices.confusion([EVIL, "b"], [[3, 1], [0, 2]], EVIL, EVIL),
    ]


@pytest.mark.parametrize(
    "content",
    [
        EVIL,
        Heading(EVIL),
        Table(EVIL, [EVIL, EVIL], [[EVIL, EVIL]]),
        Table(EVIL, [EVIL, EVIL], [[EVIL, EVIL]], last_bold=True),
        Legend([(EVIL, EVIL)]),
        Legend([(EVIL, EVIL), (EVIL, EVIL)], "depth"),
        Legend([(EVIL, EVIL)], EVIL),
        Terms([(EVIL, EVIL)]),
        Details(EVIL, Terms([(EVIL, EVIL)])),
        Details(EVIL, Table(EVIL, [EVIL], [[EVIL]]), open=True),
        *(
            Figure(EVIL, chart, EVIL, Table(EVIL, [EVIL], [[EVIL]]), wide=wide)
            for chart in evil_charts()
            for wide in (0, 1)
        ),
        Multiples(
            EVIL, [Panel(EVIL, evil_charts()[0], EVIL)], EVIL, [Table(EVIL, [EVIL], [[EVIL]])], Legend([(EVIL, EVIL)])
        ),
        Cases([Case(EVIL, [(EVIL, EVIL), ("", EVIL)])]),
        Details(EVIL, Cases([Case(EVIL, [(EVIL, EVIL)])])),
        Grid([curve_figure(evil_charts()[0], [Series(EVIL, EVIL, ((1, 2.0),))], EVIL)]),
    ],
    ids=lambda content: type(content).__name__,
)
def test_every_string_of_every_kind_of_content_is_escaped_in_text_and_attributes(content):
    page = rendered(content)
    assert SAFE in page
    assert "<script" not in page
    assert EVIL not in page
    assert page.count("</style>") == 1
    assert not re.search(r"alert\(1\)(?!&lt;/script&gt;&#34;&#39;&amp;)", page)


def test_every_string_of_the_page_itself_is_escaped():
    sections = [Section(EVIL, EVIL, [EVIL]) for _ in range(3)]  # enough for links to them
    page = Page(EVIL, EVIL, EVIL, sections, EVIL, [(EVIL, EVIL)], [EVIL]).render()
    assert "<script" not in page
    assert page.count("</style>") == 1
    assert page.count(SAFE) == page.count("alert(1)") == 7 + 3 * 7
    assert f'href="#{SAFE}"' in page


def test_markup_of_the_page_is_not_escaped_and_a_name_without_a_value_is_an_error():
    page = rendered(Table("caption", ["a", "b"], [["c", "1"]], last_bold=True))
    assert '<td class="number"><b>1</b></td>' in page
    with pytest.raises(UndefinedError):
        _environment().from_string("{{ missing }}").render()


def test_a_tables_headers_have_scopes():
    page = rendered(Table("caption", ["a", "b"], [["c", "1"]]))
    assert page.count('scope="col"') == 2
    assert page.count('scope="row"') == 1


def test_a_section_without_content_and_links_to_few_sections_are_left_out():
    full, empty = Section("full", "Full", ["text"]), Section("empty", "Empty", [])
    page = Page("t", "h", "s", [full, empty, full]).render()
    assert "Empty" not in page
    assert "<nav" not in page
    assert "<nav" in Page("t", "h", "s", [full] * 3).render()


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
        made = drawn(charts.lines([Series("s", "lily", tuple((x, 1.0 + x) for x in xs))], "t", "d", "x", "y", y=(0, 9)))
        return re.findall(r'y="232" class="tick" text-anchor="middle">([^<]*)<', made)

    assert marks(1, 2, 3, 4) == ["1", "2", "3", "4"]
    assert marks(0.0, 0.5, 2.0) == ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5", "1.75", "2"]


@pytest.mark.parametrize("chart", evil_charts(), ids=range(8))
def test_every_chart_has_a_role_a_name_and_a_description(chart):
    assert isinstance(chart, Chart)
    picture = drawn(chart)
    assert 'role="img"' in picture
    names = re.search(r'aria-labelledby="(\S+) (\S+)"', picture).groups()
    assert f'<title id="{names[0]}">' in picture
    assert f'<desc id="{names[1]}">' in picture
    assert "nan" not in picture.lower()


def test_curves_without_values_are_no_picture():
    assert charts.lines([Series("s", "lily", ())], "t", "d", "x", "y") is None


def test_a_heat_map_has_a_key_of_its_shades_however_narrow_its_cells_are():
    for layers in (3, 15, 48):
        names = [str(i) for i in range(layers)]
        made = drawn(matrices.heat_map(["B0"], names, [[0.2] * layers], "t", "d", "layer", 0.8))
        cells = re.findall(r'<rect[^>]*style="fill-opacity:([\d.]+)"', made)
        assert len(cells) == layers + 5
        assert [float(c) for c in cells[-5:]] == pytest.approx([matrices.SHADE * i / 4 for i in range(5)], abs=1e-3)
        assert float(cells[0]) == pytest.approx(float(cells[-4]))  # 0.2 of 0.8 is the second shade
        for value in ("0.00", "0.20", "0.40", "0.60", "0.80"):
            assert f">{value}</text>" in made


@pytest.mark.parametrize("layers", [9, 12, 32, 80])
def test_many_layers_are_colored_by_depth_over_the_whole_ramp(layers):
    numbers = [int(charts.depth_style(i, layers).removeprefix("d")) for i in range(layers)]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (0, charts.DEPTH_COLORS - 1)
    assert len(set(numbers)) == min(layers, charts.DEPTH_COLORS)
    key = rendered(Legend([("d0", "layer 0"), ("d11", "layer <31>")], "depth"))
    assert [int(n) for n in re.findall(r"step d(\d+)", key)] == list(range(charts.DEPTH_COLORS))
    assert "layer &lt;31&gt;" in key


def test_a_confusion_matrix_has_its_counts_and_another_color_for_wrong_ones():
    made = drawn(matrices.confusion(["cat", "dog"], [[3, 1], [0, 2]], "t", "d"))
    cells = re.findall(r'class="(cell[ a-z]*)"[^>]*fill-opacity:([\d.]+)', made)
    assert [style for style, _ in cells] == ["cell", "cell wrong", "cell wrong", "cell"]
    assert [float(share) / matrices.SHADE for _, share in cells] == pytest.approx([0.75, 0.25, 0, 1], abs=1e-3)
    assert re.findall(r'class="incell"[^>]*>([^<]*)<', made) == ["3", "1", "2"]
    assert "cat, predicted dog: 1 of 4 (25.0%)" in made


@pytest.mark.parametrize("classes", [2, 12, 30])
def test_a_confusion_matrix_holds_the_names_of_its_classes(classes):
    names = [f"a class with a long name {i}" for i in range(classes)]
    chart = matrices.confusion(names, [[1] * classes] * classes, "t", "d")
    made = drawn(chart)
    assert made.count("a class with a lo\u2026") == 2 * classes
    assert all(0 <= float(x) <= chart.width for x in re.findall(r'<(?:text|rect) x="([^"]+)"', made))


def test_levels_that_nearly_coincide_have_names_that_do_not_cover_one_another_and_are_inside_the_axis():
    curve = [Series("s", "lily", ((1, 0.5), (2, 0.6)))]
    chart = charts.lines(curve, "t", "d", "x", "y", levels=[(0.9, "one"), (0.899, "two")])
    lines = re.findall(r'<line[^>]*y1="([\d.]+)"[^>]*class="level"', drawn(chart))
    at = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>(?:one|two)<', drawn(chart))]
    assert abs(at[0] - at[1]) >= 12
    assert all(0 < float(y) < chart.height for y in lines)


def luminance(color):
    """Relative luminance, as WCAG defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_lines_stand_out_from_their_ground(scheme):
    css = rendered("text").partition("<style>")[2].partition("</style>")[0]
    roots = dict(zip(("light", "dark", "print"), re.findall(r":root\{([^}]*)\}", css), strict=True))
    colors = dict(re.findall(r"--(\w+):(#\w{6})", roots[scheme]))
    lines = ["lily", "union", "lora", *(f"l{i}" for i in range(charts.EXPERT_COLORS))]
    lines += [f"d{i}" for i in range(charts.DEPTH_COLORS)]
    for name in lines:
        assert f".curve.{name}," in css
        low, high = sorted((luminance(colors[name]), luminance(colors["panel"])))
        assert (high + 0.05) / (low + 0.05) >= 3, name
    assert {f"e{i}" for i in range(charts.EXPERT_COLORS)} <= colors.keys()
