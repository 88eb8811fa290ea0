"""Figures for papers: one column wide, in the page's colours, the same bytes each time."""

import ast
import re
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from markupsafe import Markup
from matplotlib.image import imread

from forescale.pages.figure import TARGET, Axis, Figure, band, dots, line, marks, ordinal, star
from forescale.pages.picture import pictures

ROOT = Path(__file__).parents[3]
BLUE, GREEN = "#0000fe", "#00fe00"


def figure(across: Axis | None = None) -> Figure:
    """A line, a band, a hollow and a filled dot, a diamond, a star with its interval."""
    at = np.array([1e10, 1e11, 1e12])
    hollow = np.array([True, False, False])
    across = across or Axis("C (FLOPs)", log=True, power=True)
    return Figure(across, Axis("loss &amp; more <b>")).add(
        band(at, np.array([[1, 1, 1], [3, 3, 3.0]]), "#09090980"),
        line(at, np.array([3, 2, 1.5]), GREEN, "dash"),
        dots(at, np.array([3, 2, 2.0]), [BLUE] * 3, ["a", "b", "c"], hollow),
        marks([1e11], [2.0], ["vertex"]),
        star(1e12, 1.5, "target", (1.2, 1.9)),
    )


def test_a_png_of_a_column_at_300_dots_an_inch():
    files = pictures([figure()])
    assert set(files) == {"png", "svg"}
    height, width, _ = imread(BytesIO(files["png"])).shape
    assert width == round(3.4 * 300)
    assert 500 < height < 1000
    two = imread(BytesIO(pictures([figure(), figure()])["png"]))
    assert 1.9 * height < two.shape[0] <= 2 * height, "two figures have one key"
    assert two.shape[1] == width


@pytest.mark.parametrize("letters", [3, 12, 17, 26, 40])
def test_a_key_of_long_names_is_not_cut_at_the_sides(letters):
    """The outermost pixels on both sides are white."""
    key = [(f"{i} {'llama+muon+' * 4}"[:letters], BLUE) for i in range(5)]
    picture = imread(BytesIO(pictures([figure()], key)["png"]))
    assert picture[:, :6].min() == picture[:, -6:].min() == 1


def test_a_key_names_all_marks():
    svg = pictures([figure()])["svg"].decode()
    assert {"<!-- target -->", "<!-- not used -->"} <= set(re.findall("<!-- .* -->", svg))


def test_colours_and_hollow_dots_are_those_of_the_page():
    svg = pictures([figure()])["svg"].decode()
    ElementTree.fromstring(svg)
    for colour in ("#00fe00", "#090909", TARGET):
        assert colour in svg
    runs = re.findall(r'<use .*style="(fill[^;]*); stroke: #0000fe', svg)
    assert runs == ["fill-opacity: 0", "fill: #0000fe", "fill: #0000fe"]


def test_the_same_figure_gives_the_same_bytes():
    assert pictures([figure()], [("1e18", BLUE)]) == pictures([figure()], [("1e18", BLUE)])


def test_names_are_literal_and_powers_are_raised():
    """A dollar, a backslash or a tag makes no formula; 10<sup>18</sup> of a key does."""
    odd = figure(ordinal("<sup>x</sup> $\\frac{ &lt;i&gt;", ["$\\a$", "<b>", "c"]))
    svg = pictures([odd], [(Markup("1×10<sup>−18</sup>"), BLUE), ("10<sup>2</sup>", GREEN)])["svg"]
    texts = set(re.findall("<!-- (.*) -->", svg.decode()))
    assert {"1×10$^{-18}$", "10&lt;sup&gt;2&lt;/sup&gt;"} <= texts


@pytest.mark.parametrize("power", [True, False])
@pytest.mark.parametrize("decades", [0.25, 0.5, 1.5, 6])
def test_logarithmic_axes_have_numbers(power, decades):
    x = np.geomspace(2e10, 2e10 * 10**decades, 5)
    curve = Figure(Axis("C", log=True, power=power), Axis("loss", log=True))
    curve.add(line(x, np.linspace(3, 2, 5), GREEN))
    across, up = pictures([curve])["svg"].decode().split('id="matplotlib.axis_')[1:]
    numbers = [re.findall(r"<!-- (\S*\d\S*) -->", axis) for axis in (across, up)]
    assert len(numbers[0]) >= 2
    assert any("10^{" in n for n in numbers[0]) == power
    assert {"2", "2.2", "2.4", "2.6", "2.8", "3"} <= set(numbers[1])


def test_a_figure_without_a_finite_number_is_drawn():
    nothing = Figure(Axis("x", log=True), Axis("y")).add(line(np.full(2, np.nan), np.ones(2), BLUE))
    assert nothing.ends("x") == (1.0, 10.0)
    assert pictures([nothing], forms=["png"])["png"]


def test_a_command_never_loads_matplotlib_before_it_draws():
    for path in (ROOT / "trainer").rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        names |= {str(n.module) for n in tree.body if isinstance(n, ast.ImportFrom)}
        if path.name not in ("picture.py", "loss_picture.py"):
            heavy = ("matplotlib", "forescale.pages.picture", "forescale.monitor.report.loss")
            assert not any(n.startswith(heavy) for n in names), path
