"""The picture of the loss: its lines are at the numbers of the rows, whatever it is saved as."""

import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from forescale.monitor.report.axes import axis_of, texts, ticks
from forescale.monitor.report.curves import Curves, Line
from forescale.monitor.report.events import Event
from forescale.monitor.report.panels import Drawn
from forescale.monitor.report.picture import laid_out, path, png, running_median, svg

_SVG = "{http://www.w3.org/2000/svg}"


def drawn(label: str = "a & b <c>", losses=(5.0, 4.0, np.nan, 3.0, 2.0)) -> Drawn:
    steps = np.arange(1.0, len(losses) + 1)
    places = {"step": steps, "tokens": 1e6 * steps, "flops": 1e18 * steps, "time": 60 * steps}
    line = Line(places, np.array(losses))
    curves = Curves({"loss": line}, {"validation": {"loss": line}}, steps=steps, places=places)
    return Drawn(label, curves, [Event("restart", "resumed", 2, 0.0)], ())


def test_ticks_are_round_and_inside():
    assert ticks(0, 500_000, 6) == tuple(range(0, 500_001, 100_000))
    assert ticks(2.13, 3.4, 6) == pytest.approx((2.2, 2.4, 2.6, 2.8, 3.0, 3.2, 3.4))
    assert texts(axis_of("tokens", 2.5e9, 5)) == ["0", "500M", "1B", "1.5B", "2B", "2.5B"]
    assert texts(axis_of("flops", 3e18, 3)) == ["0", "10¹⁸", "2×10¹⁸", "3×10¹⁸"]
    assert texts(axis_of("time", 7200.0, 6)) == ["0", "20", "40", "60", "80", "100", "120"]


def test_a_median_is_of_the_points_around_and_knows_gaps():
    values = np.random.default_rng(0).normal(size=30)
    values[7] = np.nan
    found = running_median(values, 5)
    assert np.isnan(found[7])
    assert found[0] == values[0]  # the loss falls fast there
    assert found[1] == np.median(values[:3])
    assert found[15] == np.median(values[13:18])
    assert found[8] == np.median(values[[6, 8, 9, 10]])
    assert found[29] == np.median(values[27:])


def test_the_svg_has_each_number_in_its_place_and_text_as_text():
    made = svg(laid_out([drawn(), drawn("other")], "step"))
    assert made == svg(laid_out([drawn(), drawn("other")], "step"))
    tree = ElementTree.fromstring(made)
    shown = [node.text for node in tree.iter(f"{_SVG}text")]
    assert {"a & b <c>", "other", "step", "loss (nats a token)", "held-out text"} <= set(shown)
    lines = [p.get("d") for p in tree.iter(f"{_SVG}path") if p.get("stroke-width") == "1.7"]
    places = re.findall(r"([ML])([\d.]+) ([\d.]+)", lines[0])
    assert [sign for sign, _, _ in places] == ["M", "L", "M", "L"]  # a gap where it is not finite
    x, y = np.array([place[1:] for place in places], dtype=float).T
    np.testing.assert_allclose(np.diff(x) / np.diff(x)[0], [1, 2, 1], rtol=0.01)
    assert (np.diff(y)[:2] > 0).all()  # the loss falls


def test_a_path_of_nothing_finite_is_empty():
    assert path(np.full((3, 2), np.nan)) == ""
    assert path(np.array([[1.0, 2.0], [3.0, 4.0]])) == "M1.0 2.0L3.0 4.0"


def test_a_png_has_the_colours_of_the_runs():
    pytest.importorskip("matplotlib")
    from io import BytesIO

    from PIL import Image

    image = Image.open(BytesIO(png(laid_out([drawn(), drawn("$b$")], "time"))))
    assert image.size == (1440, 660)
    colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x0B, 0x5C, 0xAD), (0xC2, 0x41, 0x0C)} <= colours


def test_without_matplotlib_a_png_is_refused_with_the_way_out(own_run, forescale, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.backends.backend_agg", raising=False)
    code, _, err = forescale("report", "small", "output=loss.png")
    assert code == 2
    assert ".svg" in err
    code, out, _ = forescale("report", "small", "output=loss.svg", "x=flops")
    assert (code, out.split(":")[0]) == (0, "loss.svg")
