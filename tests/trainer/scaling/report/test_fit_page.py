"""`study report`: the file has all sections and numbers, and a real browser draws it offline."""

import base64
import io
import re
from contextlib import contextmanager
from html import unescape
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from forescale.pages.picture import FORMATS
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.forecasting.predictor import band_of
from forescale.scaling.report import fit_page as module
from forescale.scaling.report.evidence import StudyEvidence
from forescale.scaling.report.fit_figures import Figures
from forescale.scaling.report.fit_sections import verdict
from tests.trainer.offline_tab import offline_tab
from tests.trainer.scaling import simulated_study

TRUTH = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
COMMAND = ("forescale", "study", "report", "my runs.csv")
PICTURES = ("loss-by-compute", "isoflop-curves", "best-parameters", "best-tokens", "contours",
            "residuals-by-compute", "residuals-by-size", "backtest-errors")  # fmt: skip
SECTIONS = ("prediction", "doubts", "isoflop", "optimum", "surface", "residuals",
            "backtests", "parameters", "certificate", "backtest-table", "influence", "notes",
            "provenance")  # fmt: skip


def surface(name: str = "run") -> pd.DataFrame:
    """IsoFLOP runs of a law; all sizes of the last budget are on one side of its best."""
    budgets = np.geomspace(1e18, 1e21, 6)
    c = np.repeat(budgets, 6)
    n = 0.1 * c**0.5 * np.tile(np.geomspace(0.2, 5, 6), len(budgets))
    n[-6:] *= 6
    d = c / (6 * n)
    noise = 0.001 * np.random.default_rng(0).standard_normal(len(c))
    loss = CHINCHILLA.predict(TRUTH, parameters=n, tokens=d) * np.exp(noise)
    names = [f"{name} {i}" for i in range(len(c))]
    columns = {"name": names, "parameters": n, "tokens": d, "flops": c, "budget": c, "loss": loss}
    return pd.DataFrame(columns)


def study(table: pd.DataFrame, **keys) -> StudyFit:
    return StudyFit(table, StudyJob(input=["x.csv"], bootstraps=100, **keys), "x.csv")


def page(study: StudyFit, where: str, command=COMMAND) -> str:
    """The page of runs that belong to no planned study."""
    return module.page(study, StudyEvidence(study.table), where, command)[0]


@pytest.fixture(scope="module")
def fit() -> StudyFit:
    """With a run that is there twice, so that there is a doubt."""
    rows = surface(HOSTILE)
    return study(pd.concat([rows, rows.iloc[[3]]]), target=TargetPoint(flops=5e21))


@pytest.fixture(scope="module")
def html(fit) -> str:
    return page(fit, f"runs {HOSTILE}", COMMAND)


def section(html: str, name: str) -> str:
    return html.split(f'<section id="{name}">')[1].split("</section>")[0]


def values(html: str) -> list[float]:
    return [float(x) for x in re.findall(r'<data value="([^"]*)">', html)]


def text(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


def test_every_section_and_figure_is_there(html):
    assert tuple(re.findall(r'<section id="([^"]*)">', html)) == SECTIONS
    assert tuple(re.findall(r'<div class="chart" id="([^"]*)"', html)) == PICTURES
    assert 'class="absent"' not in html.split("<main>")[1]


def test_numbers_are_those_of_the_fit(fit, html):
    f = fit.predict()
    sizes = (f.parameters, *f.sizes[0], f.tokens, *f.sizes[1])
    want = [f.loss, *f.outer, *f.inner, *sizes, f.flops, f.extrapolation_factor]
    assert values(section(html, "prediction"))[: len(want)] == want
    low, high = fit.replicates.interval(fit.job.level)
    rows = [
        [value, fit.replicates.errors[s], low[i], high[i],
         *(other.values[s] for other in fit.others.values())]
        for i, (s, value) in enumerate(fit.fit.values.items())
    ]  # fmt: skip
    a, interval = fit.allocation
    want = [*np.concatenate(rows).tolist(), a, *interval.tolist()]
    assert values(section(html, "parameters")) == want
    certificate = [fit.fit.value, fit.fit.certificate.scaled_gradient]
    assert values(section(html, "certificate"))[:2] == certificate
    bare = [float(r.inside_resampled.mean()) for r in fit.backtests]
    assert values(section(html, "backtest-table"))[4::6] == bare


def test_the_first_picture_shows_minima_and_the_fan_of_the_forecast_and_fits_its_axes_to_them(fit):
    figure, f = Figures(fit, "N", "C", "nats").loss_by_compute(), fit.predict()
    (runs, _) = (t for t in figure.traces if t.kind == "dots")
    lowest = fit.table.groupby("budget")["loss"].min()
    assert runs.x.tolist() == lowest.index.tolist()
    assert runs.y.tolist() == lowest.tolist()
    assert figure.ends("y")[1] < 1.05 * lowest.max() < fit.table["loss"].max()
    assert f.flops < figure.ends("x")[1] < 2 * f.flops
    wide, narrow = (t for t in figure.traces if t.kind == "band")
    for band, ends in ((wide, f.outer), (narrow, f.inner)):
        assert band.x[[0, -1]] == pytest.approx([1.01e21, f.flops])
        assert (band.y[-1], band.high[-1]) == pytest.approx(ends)
    (best,) = Figures(fit, "N", "C", "nats")._optimal(np.array([f.flops]))["parameters"]
    assert best == pytest.approx(f.parameters), "the fan is of runs such as the target"


def earlier(error: float, of_line: float, beyond: float = 3.0) -> pd.DataFrame:
    """Two backtests at a distance, and worse ones at its square."""
    return pd.DataFrame([
        {"group": "minima", "method": method, "origin": origin, "inside_90": 1.0,
         "beyond": beyond**ahead, "band": band_of(beyond**ahead),
         "error": ahead * size * (-1) ** origin}
        for ahead in (1, 2) for origin in (3, 4) for method, size in
        (("combined", error), ("line", of_line))
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "factor", "sentence"),
    [
        (earlier(0.002, 0.004), 2, "Backtest: 2 predictions at 3 times the known compute were "
         "off by 0.20% on average, a straight line through the last two budgets by 0.40%; 2 of 2 "
         "were inside the 90% interval."),
        (earlier(0.002, 0.004), 9, "off by 0.40% on average"),
        (earlier(0.004, 0.002), 4, "but the line was better: it predicts 2."),
        (earlier(0.002, 0.004), 1000, "No backtest reaches the target, 1000 times the compute of "
         "the runs; the nearest, 2 predictions at 9 times the known compute, were off by"),
        (None, 2, "No backtests"),
    ],
)  # fmt: skip
def test_the_verdict_is_that_of_the_backtests_at_the_distance_of_the_target(
    fit, rows, factor, sentence
):
    one = SimpleNamespace(earlier=rows, method="combined", points=fit.points, table=fit.table,
                          form=fit.form)  # fmt: skip
    assert sentence in verdict(one, factor)


def test_every_doubt_is_on_the_page(fit, html):
    assert fit.notes
    for note in fit.notes:
        assert note in text(section(html, "notes"))
    assert fit.doubts
    for doubt in fit.doubts:
        assert doubt in text(section(html, "doubts"))
    assert fit.doubts[0] in text(section(html, "prediction"))
    (refused,) = fit.isoflop.refusals
    assert refused.why in text(section(html, "isoflop"))


def test_the_page_says_where_the_numbers_come_from(fit, html, tmp_path):
    words = text(section(html, "provenance"))
    for part in ("Huber 0.001 on log loss", CHINCHILLA.source, "numpy ", "seed 0",
                 "forescale study report 'my runs.csv'", "as the table counts"):  # fmt: skip
        assert part in words
    path = tmp_path / "x.csv"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert known in page(fit, str(path), COMMAND)


def test_names_of_runs_are_shown_as_text(html):
    body = html.split("</style>")[1]
    assert "alert(1)" in body
    assert "<img" not in body.split("</head>")[1]
    assert "<script>alert" not in body


def test_nothing_is_loaded_and_the_page_is_small(html):
    assert len(html) < 300_000
    assert not re.search(r'<(script|link|img)[^>]* (src|href)="(?!data:)', html)


def test_the_same_study_gives_the_same_bytes(fit, html):
    assert page(fit, f"runs {HOSTILE}") == html


def test_sections_without_budgets_or_target_say_why():
    rows = surface().drop(columns="budget")
    rows["flops"] *= np.geomspace(1, 3, len(rows))  # no two runs have the same compute
    html = page(study(rows), "runs", COMMAND)
    assert "No target is given" in section(html, "prediction")
    assert "no budgets" in section(html, "isoflop")
    assert "no budgets" in section(html, "backtests")
    assert "no budgets" in section(html, "backtest-table")
    drawn = re.findall(r'<div class="chart" id="([^"]*)"', html)
    assert drawn == [p for p in PICTURES if p not in ("isoflop-curves", "backtest-errors")]


def test_a_target_that_is_too_far_is_explained_on_the_page():
    html = page(study(surface(), target=TargetPoint(flops=1e25)), "runs", COMMAND)
    assert "times the compute of the largest run" in section(html, "prediction")


def test_unusable_parabolas_are_explained():
    """The runs of each budget are on one side of its best."""
    table = surface()
    table = table[(table["parameters"] > 0.1 * table["flops"] ** 0.5) & (table["flops"] < 5e19)]
    html = page(study(table, near=None), "runs", COMMAND)
    assert "budgets have a vertex" in section(html, "isoflop")
    assert 'id="isoflop-curves"' in html


@pytest.mark.slow  # a report of each law
@pytest.mark.parametrize("form", ["kaplan", "frontier", "over-training"])
def test_every_law_has_a_report(form):
    html = page(study(surface(), form=form, target=TargetPoint(flops=2e21)), "runs", COMMAND)
    absent = text(section(html, "surface"))
    assert ("doesn't depend on both" in absent) == (form == "frontier")
    assert 'id="loss-by-compute"' in html
    assert "nan" not in text(section(html, "prediction"))


def test_the_main_figures_and_the_records_are_written_beside_the_page(fit, html, tmp_path):
    where = f"runs {HOSTILE}"
    module.write(fit, StudyEvidence(fit.table), tmp_path / "report.html", where, COMMAND)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report-files", "report.html"]
    assert (tmp_path / "report.html").read_text() == html
    names = [f"{name}.{form}" for name in ("isoflop", "optimum", "prediction") for form in FORMATS]
    assert sorted(p.name for p in (tmp_path / "report-files").iterdir()) == sorted(
        [*names, "records.csv"]
    )
    records = pd.read_csv(tmp_path / "report-files" / "records.csv")
    assert records["loss"].tolist() == fit.table["loss"].tolist()


def test_the_page_contains_the_records(fit, html):
    link = re.search(r'<a download="records.csv" href="data:text/csv;base64,([^"]*)"', html)
    records = pd.read_csv(io.BytesIO(base64.b64decode(link[1])))
    pd.testing.assert_frame_equal(records, fit.table, check_exact=True)


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_draws_it_offline(browser, fit, html, tmp_path, width):
    with opened(browser, html, tmp_path, width, PICTURES) as tab:
        traces = tab.evaluate("kit.data.figures['loss-by-compute'].traces")
        stars = [t["y"][0] for t in traces if t["shapes"] == ["star"]]
        assert stars == [pytest.approx(fit.predict().loss, rel=1e-5)]
        _point_at_a_refused_run(tab)
        _zoom_and_save(tab)


@pytest.mark.browser
def test_the_first_screen_has_the_answer_its_picture_and_the_verdict(browser, html, tmp_path):
    with opened(browser, html, tmp_path, 1280, ()) as tab:
        places = ["#prediction table", "#loss-by-compute", "#prediction li >> nth=1"]
        boxes = [tab.locator(one).bounding_box() for one in places]
        assert all(box["y"] + box["height"] < 800 for box in boxes)
        assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"], "they are side by side"


@pytest.mark.browser
def test_a_browser_draws_a_study_and_saves_its_records(browser, tmp_path):
    observed = simulated_study.known(tmp_path / "forecasts", "s")
    fit = StudyFit(observed.fitted, simulated_study.job(), "x")
    html, _ = module.page(fit, observed, "cells", COMMAND)
    drawn = tuple(re.findall(r'<div class="chart" id="([^"]*)"', html))
    assert set(drawn) >= {
        "forecast-errors",
        "response-rate",
        "response-batch",
        "repeats",
        "goodput",
    }
    with opened(browser, html, tmp_path, 360, drawn) as tab:
        with tab.expect_download() as saving:
            tab.locator("a[download]").click()
        assert saving.value.suggested_filename == "records.csv"
        saved = pd.read_csv(saving.value.path())
        assert saved["loss"].tolist() == observed.records["loss"].tolist()


@contextmanager
def opened(browser, html, tmp_path, width, pictures):
    """The drawn page at this width. Checks that nothing overflows, fails or is requested from a
    network, now and until the end."""
    with offline_tab(browser, html, tmp_path / "report.html", width) as tab:
        tab.locator("body[data-drawn]").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for name in pictures:
            box = tab.locator(f"#{name} svg").bounding_box()
            assert box["x"] >= 0
            assert 300 < box["width"] <= width - box["x"]
            assert tab.locator(f"#{name} svg g > *").count() > 0
        yield tab


def _point_at_a_refused_run(tab) -> None:
    """All runs of the most expensive budget are rejected; reason and name are shown as text."""
    dot = tab.locator("#isoflop-curves g > path[transform]").nth(35)
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    text = tab.locator("#isoflop-curves .readout").text_content()
    assert "No parabola" in text
    assert "<img" in text


def _zoom_and_save(tab) -> None:
    """Drag over a part of the x axis, save the picture, and go back."""
    chart = tab.locator("#loss-by-compute")
    chart.scroll_into_view_if_needed()
    box, before = chart.bounding_box(), chart.locator("svg").text_content()
    for share, act in ((0.4, tab.mouse.down), (0.8, tab.mouse.up)):
        tab.mouse.move(box["x"] + box["width"] * share, box["y"] + 100)
        act()
    assert chart.locator("svg").text_content() != before
    with tab.expect_download() as saving:
        chart.locator(".save").click()
    assert saving.value.suggested_filename == "loss-by-compute.svg"
    chart.locator("svg").dblclick(position={"x": 100, "y": 50})
    assert chart.locator("svg").text_content() == before
