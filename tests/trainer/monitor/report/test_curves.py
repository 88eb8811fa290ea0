"""Curves and events are what the rows say: means of steps, steps that were lost, what happened."""

import math
import shutil

import numpy as np
import pytest

from forescale.monitor.report.curves import read_curves
from forescale.monitor.report.events import LOOKS, events_of
from forescale.monitor.status import Status
from forescale.resilience.outcome import record_end, record_start
from forescale.run.directory import Parent, Run


@pytest.fixture
def run(trained, tmp_path) -> Run:
    """With the config of another run, and no attempt yet."""
    run = Run(tmp_path / "runs" / "made")
    run.path.mkdir(parents=True)
    shutil.copy(trained.config, run.config)
    return run


def begun(run: Run, step: int = 0, **parent):
    attempt = run.new_attempt()
    record_start(attempt.path, ["train"], 2)
    attempt.start_from(Parent(step, f"step-{step}" if step else None, **parent), run)
    return attempt


def train(attempt, steps, loss=lambda step: 10.0 - step / 10):
    for step in steps:
        rates = {"muon": 0.1 * step, "decayed": 0.01 * step}
        attempt.metrics.add({
            "kind": "train", "step": step, "attempt": attempt.number, "tokens": 100 * step,
            "flops_causal": 1e12 * step, "loss": loss(step), "learning_rate": rates,
            "seconds": {"compute": 2.0, "data": 0.5},
        })  # fmt: skip


def test_without_thinning_each_step_is_a_point(run):
    attempt = begun(run)
    train(attempt, range(1, 11))
    score = {"kind": "validation", "dataset": "validation", "loss": 9.5, "bits_per_byte": 2.0}
    attempt.metrics.add({**score, "step": 5, "tokens": 500})
    curves = read_curves(run)
    line = curves.lines["loss"]
    assert line.y.tolist() == [10.0 - step / 10 for step in range(1, 11)]
    assert line.low is None
    assert line.x["step"].tolist() == [*range(1, 11)]
    assert line.x["tokens"].tolist() == [*range(100, 1100, 100)]
    assert line.x["time"].tolist() == [2.5 * step for step in range(1, 11)]
    assert curves.lines["learning_rate.decayed"].y[-1] == pytest.approx(0.1)
    assert "grad_norm" not in curves.lines
    held = curves.scores["validation"]["loss"]
    assert (held.y.tolist(), held.x["flops"].tolist()) == ([9.5], [5e12])
    assert curves.at(2.5) == {"step": 2.5, "tokens": 250.0, "flops": 2.5e12, "time": 6.25}


def test_a_thinned_point_is_the_mean_of_its_steps_beside_their_extremes(run):
    def loss(step):
        return math.nan if step in (2, 7, 8, 9) else float(step**2)

    train(begun(run), range(1, 12), loss)
    curves = read_curves(run, most=4)
    line = curves.lines["loss"]
    assert curves.per_point == 3
    assert line.x["step"].tolist() == [3, 6, 9, 11]
    np.testing.assert_array_equal(line.y, [(1 + 9) / 2, (16 + 25 + 36) / 3, np.nan, 110.5])
    np.testing.assert_array_equal(line.low, [1, 16, np.nan, 100])
    np.testing.assert_array_equal(line.high, [9, 36, np.nan, 121])
    assert curves.broken == [2, 7, 8, 9]


def test_steps_that_were_not_kept_are_a_curve_of_their_own(run):
    train(begun(run), range(1, 9))
    train(begun(run, 4), range(5, 7), lambda step: 1.0)
    curves = read_curves(run)
    assert curves.lines["loss"].x["step"].tolist() == [1, 2, 3, 4, 5, 6]
    (dropped,) = curves.dropped
    assert dropped.x["step"].tolist() == [5, 6, 7, 8]
    assert dropped.y.tolist() == pytest.approx([9.5, 9.4, 9.3, 9.2])
    assert dropped.x["time"].tolist() == [12.5, 15.0, 17.5, 20.0]


def test_starts_ends_rollbacks_and_faults_are_told_in_order(run):
    first = begun(run)
    train(first, range(1, 8))
    first.event("update_dropped", step=3, reason="the gradient overflowed")
    first.event("rollback", step=7, reason="a loss spike", loss=9.0, grad_norm=1.0)
    second = run.attempt_after(first)
    second.start_from(Parent(4, "step-4", ((12, 20),), rolled_back_from=7), run)
    train(second, range(5, 10))
    record_end(first.path, 1, "rank 1 ended with SIGKILL")
    third = begun(run, 8)
    train(third, range(9, 11))
    third.event("ended", step=10, reason="interrupted", seconds={})
    record_end(third.path, 75, "interrupted")
    events = events_of(Status(run))
    assert [(e.sort, e.step) for e in events] == [
        ("skipped", 3), ("rollback", 7), ("failure", 9), ("restart", 8), ("interrupted", 10),
    ]  # fmt: skip
    texts = [e.text for e in events]
    assert texts[1] == (
        "rolled back from step 7 to 4: a loss spike; samples 12 to 19 are skipped for good"
    )
    assert "rank 1 ended with SIGKILL" in texts[2]
    assert all(e.sort in LOOKS for e in events)


def test_a_run_without_a_row_has_no_curve(run):
    begun(run)
    curves = read_curves(run)
    assert (curves.lines, curves.scores, curves.dropped) == ({}, {}, [])
    assert events_of(Status(run)) == []


def test_an_attempt_may_begin_while_events_are_read(run):
    begun(run)
    status = Status(run)
    assert len(status.attempts) == 1
    begun(run, 4)
    assert ("restart", 4) in [(event.sort, event.step) for event in events_of(status)]
