"""The page kit: numbers in full, text as text, and both themes."""

import numpy as np
import pytest
from markupsafe import Markup
from rich.console import Console

from forescale.pages.document import Section, number, percent, render, show
from forescale.pages.figure import Axis, Figure, Trace, dots, rounded, shades
from tests.trainer.offline_tab import offline_tab

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\udce9"


def hostile_page() -> str:
    at = np.array([1.0, 2.0])
    figure = Figure(Axis(HOSTILE), Axis(HOSTILE)).add(dots(at, at, ["#216ea0"], [HOSTILE] * 2))
    section = Section("a", HOSTILE, [("chart", figure, HOSTILE)], [[HOSTILE, HOSTILE]])
    return render(title=HOSTILE, sections=[section], lead=[HOSTILE])


def test_a_number_is_rounded_for_people_and_in_full_for_programs():
    assert number(1.23456789e21, 3) == ('<data value="1.23456789e+21">1.23×10<sup>21</sup></data>')


def test_the_terminal_shows_titles_tables_and_sentences():
    growth = Markup("{} C<sup>a</sup>").format("<b>")
    table = [["name", "C", "change"], ["[b]x", number(-2e-7), percent(-0.5)]]
    facts = [["Loss", number(1.5e21)], ["", "[red]why"]]
    sections = [Section("a", "A [b]", rows=table, head=True, after=[growth]),
                Section("b", "B", rows=facts, absent="None.")]  # fmt: skip
    console = Console(width=80)
    with console.capture() as capture:
        show(console, sections, "first")
    lines = [line.strip() for line in capture.get().splitlines()]
    assert lines == [
        "first", "", "A [b]", "name      C   change", "[b]x  -2e-7  -50.00%", "<b> C^a", "", "B",
        "Loss: 1.5e21", "[red]why", "None.",
    ]  # fmt: skip


def test_whatever_a_value_says_is_text():
    html = hostile_page().encode().decode()  # also half a character, as in names of files
    assert "<img" not in html
    assert html.count("<script") == 2 == html.count("</script>")


def test_numbers_of_figures_are_short_and_what_is_not_finite_is_null():
    assert rounded([1 / 3, 123456789.0, np.nan, np.inf]) == [0.333333, 123456789, None, None]
    line = Trace("line", np.array([0.0]), np.array([1.0]), ["#216ea0"])
    assert line.as_dict()["y"] == [1]
    assert "texts" not in line.as_dict()
    colours = list(shades(np.array([1e18, 1e19, 1e18])).values())
    assert colours == ["#a2d936", "#440154"]  # the cheapest is light


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_follows_the_theme_of_the_browser(browser, tmp_path, theme):
    with offline_tab(browser, hostile_page(), tmp_path / "page.html", 390, theme) as tab:
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (theme == "light")
        tab.locator("#chart svg").hover(position={"x": 40, "y": 400})
        assert tab.locator("#chart .save").count() == 1
