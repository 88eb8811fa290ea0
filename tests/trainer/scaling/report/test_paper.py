"""Figures for papers: one column wide, in the page's colours, the same bytes each time."""

import ast
import re
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.image import imread

from forescale.monitor.report import colours
from forescale.scaling.report import style
from forescale.scaling.report.paper import drawn, write_pictures
from forescale.scaling.report.sections import Section

ROOT = Path(__file__).parents[4]
BLUE, GREEN = "rgb(0, 0, 254)", "#00fe00"


def figure(x="C (FLOPs)", **of_x) -> go.Figure:
    """A line, a band, a hollow and a filled dot, a diamond, a star with its interval."""
    made = style.axes(x, "loss &amp; more <b>", of_x or {"type": "log", "dtick": 1}, {})
    at = np.array([1e10, 1e11, 1e12])
    made.add_trace(style.band(at, np.array([[1, 1, 1], [3, 3, 3.0]]), "rgba(9,9,9,0.5)"))
    made.add_trace(style.line(at, np.array([3, 2, 1.5]), GREEN, "dash"))
    hollow = np.array([True, False, False])
    made.add_trace(style.dots(at, np.array([3, 2, 2.0]), [BLUE] * 3, hollow, ["a", "b", "c"]))
    made.add_trace(style.marks([1e11], [2.0], ["vertex"]))
    made.add_trace(style.star(1e12, 1.5, "target", (1.2, 1.9)))
    return made


def test_a_png_of_a_column_at_300_dots_an_inch():
    made = drawn([figure()])
    assert set(made) == {"png", "svg"}
    height, width, _ = imread(BytesIO(made["png"])).shape
    assert width == round(3.4 * 300)
    assert 500 < height < 1000
    two = imread(BytesIO(drawn([figure(), figure()])["png"]))
    assert 1.9 * height < two.shape[0] <= 2 * height, "two figures have one key"
    assert two.shape[1] == width


@pytest.mark.parametrize("letters", [3, 12, 17, 26, 40])
def test_a_key_of_long_names_is_not_cut_at_the_sides(letters):
    """The outermost pixels on both sides are white."""
    key = [(f"{i} {'llama+muon+' * 4}"[:letters], BLUE) for i in range(5)]
    picture = imread(BytesIO(drawn([figure()], key)["png"]))
    assert picture[:, :6].min() == picture[:, -6:].min() == 1


def test_a_key_names_all_marks():
    svg = drawn([figure()])["svg"].decode()
    assert {"<!-- target -->", "<!-- not used -->"} <= set(re.findall("<!-- .* -->", svg))


def test_colours_and_hollow_dots_are_those_of_the_page():
    svg = drawn([figure()])["svg"].decode()
    ElementTree.fromstring(svg)
    for colour in ("#00fe00", "#090909", colours.TARGET):
        assert colour in svg
    runs = re.findall(r'<use .*style="(fill[^;]*); stroke: #0000fe', svg)
    assert runs == ["fill-opacity: 0", "fill: #0000fe", "fill: #0000fe"]


def test_the_same_figure_gives_the_same_bytes():
    assert drawn([figure()], [("1e18", BLUE)]) == drawn([figure()], [("1e18", BLUE)])


def test_names_are_literal_and_powers_are_raised():
    """A dollar, a backslash or a tag makes no formula; 10<sup>18</sup> does."""
    made = figure("<sup>x</sup> $\\frac{ &lt;i&gt;", **style.ordinal(["$\\a$", "<b>", "c"]))
    assert drawn([made], [("1×10<sup>−18</sup>", BLUE)])["png"]


@pytest.mark.parametrize("power", [True, False])
@pytest.mark.parametrize("decades", [0.25, 0.5, 1.5, 6])
def test_logarithmic_axes_have_numbers(power, decades):
    x = np.geomspace(2e10, 2e10 * 10**decades, 5)
    made = style.axes("C", "loss", style.logarithmic(x, power=power), {"type": "log"})
    made.add_trace(style.line(x, np.linspace(3, 2, 5), GREEN))
    across, up = drawn([made])["svg"].decode().split('id="matplotlib.axis_')[1:]
    numbers = [re.findall(r"<!-- (\S*\d\S*) -->", axis) for axis in (across, up)]
    assert len(numbers[0]) >= 2
    assert any("10^{" in n for n in numbers[0]) == power
    assert numbers[1] == ["2", "2.2", "2.4", "2.6", "2.8", "3"]


def test_an_unknown_trace_is_refused():
    made = style.axes("x", "y", {}, {})
    made.add_trace(go.Scatter(x=[1], y=[1], mode="text"))
    with pytest.raises(TypeError, match="can't be drawn"):
        drawn([made])


def test_only_the_main_sections_are_written(tmp_path):
    why = "no budgets"
    sections = [
        Section("isoflop", "", [("a", figure(), "")]),
        Section("optimum", "", [("b", why, "")]),
        Section("residuals", "", [("c", figure(), "")]),
    ]
    assert [p.name for p in write_pictures(sections, tmp_path)] == ["isoflop.png", "isoflop.svg"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_fit_never_loads_matplotlib():
    """Only `report` does, when it draws."""
    for path in (ROOT / "trainer").rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        names |= {str(n.module) for n in tree.body if isinstance(n, ast.ImportFrom)}
        if path.name != "paper.py":
            heavy = ("matplotlib", "forescale.scaling.report.paper")
            assert not any(n.startswith(heavy) for n in names), path
