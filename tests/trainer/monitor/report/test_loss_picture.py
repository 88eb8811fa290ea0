"""The picture of the loss: its lines are at the numbers of the rows, as SVG and as PNG."""

import re
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from forescale.monitor.report.curves import Curves, Line
from forescale.monitor.report.events import Event
from forescale.monitor.report.loss_picture import losses, running_median
from forescale.monitor.report.panels import RunCurves
from forescale.pages.picture import pictures

SIZE = (7.2, 3.3)


def curves(label: str = "a & b <c>", values=(5.0, 4.0, np.nan, 3.0, 2.0)) -> RunCurves:
    steps = np.arange(1.0, len(values) + 1)
    places = {"step": steps, "tokens": 1e6 * steps, "flops": 1e18 * steps, "time": 60 * steps}
    line = Line(places, np.array(values))
    of_run = Curves({"loss": line}, {"validation": {"loss": line}}, steps=steps, places=places)
    return RunCurves(label, of_run, [Event("restart", "resumed", 2, 0.0)], ())


def test_a_median_is_of_the_points_around_and_knows_gaps():
    values = np.random.default_rng(0).normal(size=30)
    values[7] = np.nan
    medians = running_median(values, 5)
    assert np.isnan(medians[7])
    assert medians[0] == values[0]  # the loss falls fast there
    assert medians[1] == np.median(values[:3])
    assert medians[15] == np.median(values[13:18])
    assert medians[8] == np.median(values[[6, 8, 9, 10]])
    assert medians[29] == np.median(values[27:])


def test_a_figure_has_the_numbers_of_the_rows_and_its_axes_their_units():
    event, pale, line, held = losses([curves()], "time").traces
    assert event.name == "resumed"
    assert event.x.tolist() == [2.0, 2.0]
    np.testing.assert_array_equal(line.y, [5.0, 4.5, np.nan, 3.5, 3.5])
    np.testing.assert_array_equal(held.y, [5.0, 4.0, np.nan, 3.0, 2.0])
    assert pale.x.tolist() == held.x.tolist() == [1, 2, 3, 4, 5]  # minutes
    assert losses([curves()], "time").x.title == "training time (minutes, kept steps)"
    figure = losses([curves(), curves("other")], "flops")
    assert figure.x.power
    assert figure.x.ends == (0.0, 5.05e18)


def test_the_svg_is_the_same_each_time_and_has_text_as_text():
    figure = losses([curves(), curves("other $x$")], "step")
    svg = pictures([figure], size=SIZE, forms=["svg"])["svg"]
    assert svg == pictures([figure], size=SIZE, forms=["svg"])["svg"]
    ElementTree.fromstring(svg)
    texts = set(re.findall("<!-- (.*) -->", svg.decode()))
    assert {"a &amp; b &lt;c&gt;", "step", "loss (nats a token)", "held-out text"} <= texts


def test_a_png_has_the_colours_of_the_runs():
    figure = losses([curves(), curves("$b$")], "time")
    image = Image.open(BytesIO(pictures([figure], size=SIZE, forms=["png"])["png"]))
    assert image.size[0] == 2160
    colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x0B, 0x5C, 0xAD), (0xC2, 0x41, 0x0C)} <= colours


def test_the_command_writes_a_picture_over_any_axis(own_run, forescale):
    for name in ("loss.svg", "loss.png"):
        code, out, _ = forescale("report", "small", f"output={name}", "x=flops")
        assert (code, out.split(":")[0]) == (0, name)
