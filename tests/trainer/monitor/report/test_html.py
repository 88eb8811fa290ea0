"""`forescale report`: whatever state a run is in, one page says what there is of it."""

import json
import math
import re
import shutil
from html import unescape

import pytest

from forescale.monitor.report.html import labels, page
from forescale.monitor.status import Status
from forescale.run import certificate
from forescale.run.directory import Run
from tests.trainer.monitor.changed_run import changed_rows
from tests.trainer.offline_tab import offline_tab
from tests.trainer.small_run import certify, change_rows

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SECTIONS = ["summary", "loss", "held-out", "training", "time", "events", "checkpoints",
            "environment", "config"]  # fmt: skip


def data_of(html: str) -> dict:
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</scr")[0])


def section(html: str, name: str) -> str:
    part = html.split(f'<section id="{name}">')[1].split("</section>")[0]
    return unescape(re.sub(r"<[^>]*>", " ", part))


def test_the_page_of_a_run_has_its_rows_its_state_and_its_config(own_run, forescale):
    code, out, _ = forescale("report", "small")
    assert (code, out.split(":")[0]) == (0, "report-small.html")
    html = (own_run.path.parent.parent / "report-small.html").read_text()
    assert re.findall(r'<section id="([^"]*)">', html) == SECTIONS
    (run,) = data_of(html)["runs"]
    assert run["lines"]["loss"]["y"] == [pytest.approx(6 / step, rel=1e-5) for step in range(1, 9)]
    assert run["x"]["step"] == [*range(1, 9)]
    assert run["scores"]["validation"]["bits_per_byte"]["y"] == [2.25]
    assert [at["step"] for at in run["saves"]] == [4, 8]
    assert "complete" in section(html, "summary")
    assert "No row has a gradient norm." in section(html, "training")
    assert re.search(r"compute\s+12", section(html, "time"))  # 8 steps of 1.5 s
    assert "sequence_length: 32" in html


def test_the_band_of_a_forecast_is_drawn_beneath_the_loss(own_run, forescale):
    band = {"low": 1.0, "center": 2.0, "high": 3.0}
    change_rows(
        own_run.metrics,
        lambda rows: [
            r | {"band": band} if r["kind"] == "train" and r["step"] > 3 else r for r in rows
        ],
    )
    assert forescale("report", "small")[0] == 0
    (run,) = data_of((own_run.path.parent.parent / "report-small.html").read_text())["runs"]
    none = [None] * 3
    assert run["band"] == {"y": none + [2] * 5, "low": none + [1] * 5, "high": none + [3] * 5}
    assert not [name for name in run["lines"] if "band" in name]


def test_abilities_have_a_section_with_a_chart_for_each_number(own_run, forescale):
    measured = {"ability/copy/4": 0.25, "ability/copy/4_stderr": 0.04, "ability/copy/4_nats": 3.5}
    measured["ability/copy/4_nats_stderr"] = 0.2
    change_rows(
        own_run.metrics,
        lambda rows: [{**r, **measured} if r["kind"] == "validation" else r for r in rows],
    )
    assert forescale("report", "small")[0] == 0
    html = (own_run.path.parent.parent / "report-small.html").read_text()
    words = section(html, "abilities")
    assert "copy after 4 examples: right answers (%)" in words
    assert "copy after 4 examples: nats an answer" in words
    data = data_of(html)
    factors = {panel["held"]: panel["factor"] for panel in data["panels"] if panel["held"]}
    assert factors["ability/copy/4"] == 100
    scores = data["runs"][0]["scores"]["validation"]
    assert {name: line["y"] for name, line in scores.items() if "/" in name} == {
        "ability/copy/4": [0.25],
        "ability/copy/4_nats": [3.5],
    }
    assert "Right answers after 4 examples: copy 25 %\n" in forescale.prints("status", "small")


def test_layers_have_a_chart_and_texts_a_table_newest_first(own_run, forescale):
    norms = {"layers.0": 0.5, "validation": 0.25}  # a layer may have the name of a dataset
    change_rows(
        own_run.metrics,
        lambda rows: [
            r | {"layer_norms": norms} if r["kind"] == "train" and r["step"] in (4, 8) else r
            for r in rows
        ],
    )
    for step in (4, 8):
        for number, text in enumerate((f" {step} times", HOSTILE)):
            facts = {"step": step, "number": number, "prompt": "upon a", "text": text}
            own_run.attempts()[0].event("text_written", **facts)
    assert forescale("report", "small")[0] == 0
    html = (own_run.path.parent.parent / "report-small.html").read_text()
    scores = data_of(html)["runs"][0]["scores"]
    assert scores["layers.0"]["layer_norms"]["y"] == [0.5, 0.5]
    assert scores["layers.0"]["layer_norms"]["x"]["step"] == [4, 8]
    assert scores["validation"]["layer_norms"]["y"] == [0.25, 0.25]
    assert scores["validation"]["bits_per_byte"]["y"] == [2.25]
    assert "Gradient norm of each layer" in section(html, "training")
    words = section(html, "texts")
    assert words.index("8 times") < words.index("4 times")
    assert words.count("upon a") == 4
    assert HOSTILE not in html
    assert "text_written" not in section(html, "events")


def test_runs_side_by_side_show_what_differs(own_run, forescale):
    shutil.copytree(own_run.path, "elsewhere/small", symlinks=True)
    text = Run("elsewhere/small").config.read_text().partition("\n")[2]
    Run("elsewhere/small").config.write_text(text.replace("seed: 1337", "seed: 7"))
    forescale.prints("report", "small", "elsewhere/small", "./runs/small", "output=two.html")
    html = (own_run.path.parent.parent / "two.html").read_text()
    assert [run["label"] for run in data_of(html)["runs"]] == ["runs/small", "elsewhere/small"]
    assert re.search(r"train.seed\s+1337\s+7", section(html, "config"))
    assert "sequence_length" not in section(html, "config")


def test_runs_are_called_by_as_much_of_their_path_as_they_need(tmp_path):
    paths = ["x/one", "x/two", "y/two"]
    assert labels([Run(tmp_path / path) for path in paths]) == ["one", "x/two", "y/two"]


def test_text_of_a_run_is_text_on_the_page(own_run):
    own_run.attempts()[0].event("odd", step=3, reason=HOSTILE)
    html = page([own_run], "step", ["forescale", "report", HOSTILE])
    assert HOSTILE not in html
    assert html.count("<script") == 2 == html.count("</script>")
    assert HOSTILE in section(html, "events") or HOSTILE in unescape(html)
    (event,) = data_of(html)["runs"][0]["events"]
    assert HOSTILE in event["text"]


def test_a_run_without_a_step_or_an_evaluation_says_so(own_run, forescale):
    attempt = own_run.attempts()[0]
    change_rows(attempt.metrics.path, lambda rows: [r for r in rows if r["kind"] == "train"][:1])
    html = page([own_run], "tokens", [])
    assert len(data_of(html)["runs"][0]["lines"]["loss"]["y"]) == 1
    assert "No evaluation was made yet" in section(html, "held-out")
    shutil.rmtree(own_run.path / "attempts")
    shutil.rmtree(own_run.checkpoints)
    html = page([own_run], "tokens", [])
    assert "No step was made yet." in section(html, "loss")
    assert "new" in section(html, "summary")
    assert "No checkpoint was saved yet" in section(html, "checkpoints")
    assert "has made no step yet" in forescale.refuses("report", "small", "output=loss.svg")


def test_a_loss_that_is_not_finite_is_marked_and_in_no_curve(own_run):
    path = own_run.attempts()[0].metrics.path
    change_rows(path, lambda rows: [r | {"loss": math.nan} if r["step"] == 3 else r for r in rows])
    html = page([own_run], "step", [])
    (run,) = data_of(html)["runs"]
    assert run["lines"]["loss"]["y"][2] is None
    assert [at["step"] for at in run["broken"]] == [3]
    assert "the loss of 1 kept steps was not finite" in section(html, "loss")


def test_a_run_that_goes_on_shows_what_it_has(unfinished):
    html = page([unfinished], "step", [])
    (run,) = data_of(html)["runs"]
    assert run["x"]["step"] == [1, 2, 3, 4, 5, 6]
    assert run["dropped"][0]["x"]["step"] == [5, 6, 7, 8]
    assert "running" in section(html, "summary")
    assert "attempt 2 resumed from step 4" in section(html, "events")


def test_what_is_damaged_or_no_run_is_one_sentence(own_run, forescale):
    with changed_rows(own_run) as rows:
        rows[3]["crc"] = "00000000"
    for words, part in (
        (("small",), "line 4: the row is damaged"),
        (("nothing",), "no run has this name"),
        ((), "name a run or more"),
        (("small", "output=loss.pdf"), "no ending that names a format"),
    ):
        err = forescale.refuses("report", *words)
        assert part in err
        assert err.count("\n") == 1


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it_offline_over_any_axis(browser, unfinished, tmp_path, width):
    first = unfinished.attempts()[0]
    first.event("odd", step=3, reason=HOSTILE)
    other = Run(shutil.copytree(unfinished.path, tmp_path / "other" / "small", symlinks=True))
    html = page([unfinished, other], "step", [])
    with offline_tab(browser, html, tmp_path / "report.html", width) as tab:
        tab.locator("body[data-drawn]").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        loss = tab.locator("[data-panel=loss]")
        box = loss.locator("svg").bounding_box()
        assert 300 < box["width"] <= width - box["x"]
        assert loss.locator("svg > text", has_text="step").count() == 1
        solid = "g > path[stroke-width='1.7']"
        assert loss.locator(solid).count() == 2
        for name, title in (("tokens", "tokens"), ("time", "seconds"), ("flops", "FLOPs")):
            tab.locator(f"[name=x][value={name}]").check()
            assert loss.locator("svg > text", has_text=title).count() == 1
        tab.locator("[name=x][value=step]").check()
        tab.locator("[name=run][value='1']").uncheck()
        assert loss.locator(solid).count() == 1
        loss.scroll_into_view_if_needed()
        mark = loss.locator(".mark").first.bounding_box()
        tab.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + 60)
        assert "<img" in loss.locator(".readout").text_content()
        _zoom(tab, loss)


def _zoom(tab, loss) -> None:
    """Drag over the middle third: the axis is that part, and the whole one comes back."""
    ticks = "svg > text[text-anchor=middle]:not(.mark)"
    before = loss.locator(ticks).all_text_contents()
    box = loss.locator("svg").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 100)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 110, steps=3)
    tab.mouse.up()
    assert loss.locator(ticks).all_text_contents() != before
    tab.locator("#whole").click()
    assert loss.locator(ticks).all_text_contents() == before


def test_a_rehearsal_has_a_section_that_says_whether_it_is_stale(own_run, forescale, monkeypatch):
    monkeypatch.setenv("FORESCALE_CACHE", str(own_run.path.parent / "cache"))
    job = Status(own_run).job
    certify(job, {"plan.gpus": 8, "machine.name": "H100 <b>"})
    path = own_run.path.parent.parent / "report-small.html"
    assert forescale("report", "small")[0] == 0
    words = section(path.read_text(), "rehearsal")
    for fact in (r"on\s+8 H100 <b>", r"peak, GiB\s+3\s+planned peak, GiB\s+4", r"stale\s+no"):
        assert re.search(fact, words), words
    assert re.search(r"launches in a step\s+1,234", words)
    monkeypatch.setattr(certificate, "version", lambda package: "9.9")
    assert forescale("report", "small")[0] == 0
    assert re.search(r"stale\s+forescale '.*' -> '9.9'", section(path.read_text(), "rehearsal"))
