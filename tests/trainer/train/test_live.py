"""A run beside the band of its forecast: what is recorded, told and stopped, and by which rank."""

import math
from types import SimpleNamespace

import pytest

from forescale.checkpoint.reader import Position
from forescale.config.sections.batch import Cadence
from forescale.run.band import Band, Watch
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from forescale.train import live
from forescale.train.callbacks import Every, Step
from forescale.train.guard import HEALTHY, Decision, Halt

STEPS = 200
BAND = Band([0.1, 1.0], [0.3, 0.0], [0.01, 0.002], 2.0, 1.96, 2.04, 0.9)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Return what makes a Live; posted: what went to the webhook, lines: what was printed."""
    posted, lines, tracked = [], [], []
    thread = lambda target, args, daemon: SimpleNamespace(start=lambda: posted.append(args[1:3]))  # noqa: E731
    monkeypatch.setattr(live, "Thread", thread)
    run = Run(tmp_path / "run")

    def make(is_main=True, halts=False):
        metrics = SimpleNamespace(
            is_main=is_main, attempt=run.new_attempt(), line=SimpleNamespace(print=lines.append),
            track=lambda values, step: tracked.append((step, values)),
        )  # fmt: skip
        prediction = SimpleNamespace(forecast="f/0001.json", hash="a1")
        due = Every(Cadence(50), STEPS)
        return live.Live(run, Watch(BAND, STEPS), prediction, due, metrics, halts)

    return SimpleNamespace(make=make, posted=posted, lines=lines, tracked=tracked)


def train(callback, change=0.06, decision=HEALTHY):
    for at in range(1, STEPS + 1):
        loss = 2 * math.exp(BAND.at(at / STEPS)[0] + change * (at > 100) + 0.001 * (-1) ** at)
        facts = SimpleNamespace(applied=True)
        step = Step(Position(at, 4 * at, 128 * at), 0, {"data": 128}, 1.0, facts, {}, decision)
        callback.see(step, SimpleNamespace(losses=[64 * loss, 64 * loss], seconds=0.0))


def events(callback):
    return read_rows(callback.metrics.attempt.events.path)


def test_each_checkpoint_has_a_forecast_and_an_alarm_is_an_event_a_line_and_a_post(parts):
    callback = parts.make()
    train(callback)
    rows = events(callback)
    anew = [row for row in rows if row["kind"] == "forecast_anew"]
    assert [row["step"] for row in anew] == [50, 100, 150]
    assert anew[0]["loss"] == pytest.approx(2.0, rel=0.005)
    assert anew[-1]["loss"] > anew[0]["loss"]
    assert [step for step, _ in parts.tracked] == [50, 100, 150]
    assert {"forecast/loss", "forecast/inside", "forecast/above"} <= parts.tracked[0][1].keys()
    (left,) = [row for row in rows if row["kind"] == "forecast_left"]
    assert 100 < left["since"] <= left["step"] < 115
    assert left["hash"] == "a1"
    (line,) = parts.lines
    assert line.startswith(f"Step {left['step']}: The loss is ")
    assert parts.posted == [("forecast left", line.split(": ", 1)[1])]


def test_another_rank_writes_and_prints_nothing_but_halts_alike(parts):
    train(parts.make(is_main=False))
    assert not parts.lines
    assert not parts.posted
    callbacks = parts.make(halts=True), parts.make(is_main=False, halts=True)
    steps = []
    for callback in callbacks:
        with pytest.raises(Halt) as halt:
            train(callback)
        steps.append(halt.value.step)
    assert steps[0] == steps[1] < 115
    assert [row["kind"] for row in events(callbacks[0])][-2:] == ["forecast_left", "halt"]
    assert events(callbacks[1]) == []


def test_steps_that_the_guard_noted_do_not_count(parts):
    callback = parts.make(halts=True)
    train(callback, decision=Decision("note", "a spike"))
    assert callback.watch.state["means"] == []
