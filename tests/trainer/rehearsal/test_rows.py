"""The page of a rehearsal: whatever its names are, it fits a window, and each rank has its part."""

import re

import pytest

from forescale.plan.plan import Plan
from forescale.rehearsal.config import RehearseJob
from forescale.rehearsal.rehearsal import Rehearsed
from forescale.rehearsal.rows import blocks, certificate, page
from forescale.run.command import job_of
from tests.trainer.offline_tab import offline_tab

LONG = f"/home/{'a_long_name/' * 12}model<b>.py:123456"


def report(rank: int) -> dict:
    kernel = {
        "name": "triton_" + "fused_" * 20,
        "runs": 2,
        "registers": 255,
        "stack": 8,
        "shared": 9,
    }
    large = {"size": 1 << 40, "phase": "forward", "shape": [9] * 12, "dtype": "bf16", "place": LONG}
    return {
        "rank": rank,
        "phase": "done",
        "compiled": True,
        "graphs": 2,
        "on_host": [],
        "between_bytes": 1 << 40,
        "peak_bytes": (2 + rank) << 40,
        "peak_phase": "backward",
        "peaks": {"forward": 1 << 40, "backward": 2 << 40, "update": 1 << 40},
        "at_peak": {"forward": 1 << 40},
        "largest": [large],
        "collectives": [{"kind": "all_gather", "ranks": 8, "bytes": 10**15, "calls": 10**6}],
        "beside": [
            {"kind": "all_gather", "ranks": 8, "calls": 10**6, "flops": 10**21, "exposed": 10**14}
        ],
        "waits": [{"kind": "read", "place": LONG, "times": 10**6}],
        "operations": [
            {"name": name, "phase": phase, "times": 2, "flops": 9, "bytes": 9, "seconds": 1.0}
            for name, phase in (("aten::mm", "forward"), ("aten::mm", "update"))
        ],
        "kernels": [kernel],
        "breaks": [f"{LONG}: Unsupported Tensor.item() call"],
        "saved_bytes": 1 << 40,
    }


def rehearsed(*reports: dict) -> Rehearsed:
    plan = Plan(job_of(RehearseJob, ["plan.gpus=8", "train.global_batch=64"]))
    return Rehearsed(plan, 2, None, [*reports], 1.0)


def test_each_rank_and_each_problem_has_its_part_of_a_page():
    failed = {"kind": "KeyError", "text": "'x'", "place": LONG, "traceback": ""}
    html = page(
        rehearsed(report(0), report(7), {"rank": 3, "phase": "forward", "error": failed}), []
    )
    names = re.findall(r'<section[^>]* id="([^"]+)"', html)
    assert names
    assert len(names) == len({*names})
    assert "KeyError" in html
    assert "<b>.py" not in html
    assert "b&gt;.py:123456" in html  # the end of a long place


def test_a_certificate_has_the_most_of_its_ranks():
    both = rehearsed(report(0), report(7))
    one = certificate(both.plan.job, both)
    assert (one.ranks, one.peak_bytes, one.waits, one.kernels) == ([0, 7], 9 << 40, 10**6, 1)
    assert not one.equal_collectives


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_its_window(browser, tmp_path, width):
    html = page(rehearsed(report(0), report(7)), ["forescale", "rehearse", "x" * 300])
    with offline_tab(browser, html, tmp_path / "page.html", width) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_what_was_counted_stands_beside_the_law_of_the_same_parts():
    both = rehearsed(report(0))
    (block,) = (b for b in blocks(both, report(0)) if b.title == "Computation of a step")
    rows = {row.label: row.value for row in block.rows}
    launches = {name: values[0] for name, values in rows.items() if values[0] != "0"}
    assert launches == {"products": "2", "update": "2", "all": "4"}
    step = both.plan.chosen.step
    assert sum(step.parts.values()) == pytest.approx(step.computing)
    assert rows["update"][-1] == f"{1e3 * step.parts['update']:,.2f}"
