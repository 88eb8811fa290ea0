"""The band of a run's loss: alarms on simulated runs, and the end forecast anew."""

import math
import random

import pytest

from forescale.run.band import Band, Watch, alarm_text, anew_text

STEPS = 1000
SHARES = [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
ABOVE = [0.25, 0.15, 0.1, 0.06, 0.01, 0.0]
BAND = Band(SHARES, ABOVE, [0.01, 0.008, 0.006, 0.004, 0.002, 0.002], 2.0, 1.96, 2.04, 0.9)


def losses(seed=0, noise=0.01, end=2.0, change=lambda share: 0.0):
    """Yield steps and losses of a run that follows the band's center, plus a change of log loss."""
    rng = random.Random(seed)
    for step in range(1, STEPS + 1):
        share = step / STEPS
        above = BAND.at(share)[0] + change(share) + rng.gauss(0, noise)
        yield step, end * math.exp(above)


def alarms(steps, state=None):
    watch = Watch(BAND, STEPS, state or {})
    return watch, [(step, a) for step, loss in steps if (a := watch.see(step, loss))]


def test_the_band_is_the_forecast_interval_widened_by_the_shape():
    assert BAND.losses(0.05) is None
    low, center, high = BAND.losses(1.0).values()
    assert center == 2.0
    assert 1.955 < low < 1.96
    assert 2.04 < high < 2.045
    wide = BAND.losses(0.2)
    assert wide["center"] == pytest.approx(2 * math.exp(0.2), abs=1e-5)
    assert math.log(wide["high"] / wide["low"]) > math.log(high / low)


def test_healthy_runs_give_no_alarm():
    for seed in range(20):
        assert alarms(losses(seed, end=2.0 * (1 + 0.003 * (seed % 5 - 2))))[1] == []


@pytest.mark.parametrize("size", [0.04, -0.04])
def test_a_loss_that_leaves_its_course_is_told_once_and_so_is_its_return(size):
    _, alarmed = alarms(losses(change=lambda share: size if 0.5 < share < 0.7 else 0.0))
    (at, left), (later, back) = alarmed
    assert 500 < left.since <= at < 560
    assert math.copysign(1, left.beyond) == math.copysign(1, size)
    assert (left.left, back.left) == (True, False)
    assert later > 700
    text = alarm_text({"kind": "forecast_left", "step": at, **vars(left)})
    side = "above" if size > 0 else "below"
    assert f"% {side} its band since step {left.since:,}, by its own course up to step" in text


def test_a_loss_that_stays_outside_is_told_once():
    _, alarmed = alarms(losses(change=lambda share: 0.04 * (share > 0.4)))
    assert [(alarm.left, alarm.reference is None) for _, alarm in alarmed] == [(True, False)]


def test_a_run_far_from_its_forecast_is_told_from_the_start():
    _, alarmed = alarms(losses(end=2.2))
    assert alarmed[0][0] < 200
    assert alarmed[0][1].reference is None
    assert "by the forecast." in alarm_text({"kind": "forecast_left", **vars(alarmed[0][1])})


def test_a_run_that_resumes_concludes_as_one_that_was_never_stopped():
    steps = list(losses(change=lambda share: 0.04 * (share > 0.5)))
    watch, alarmed = alarms(steps)
    before, first = alarms(steps[:517])
    after, second = alarms(steps[517:], before.copy())
    assert first + second == alarmed
    assert after.state == watch.state


def test_the_end_is_forecast_anew_and_the_interval_narrows():
    watch = Watch(BAND, STEPS)
    assert watch.anew() is None
    widths, ends = [], []
    for step, loss in losses(end=2.03):
        watch.see(step, loss)
        if step in (300, 600, 900):
            anew = watch.anew()
            widths.append(anew.high - anew.low)
            ends.append(anew.loss)
    assert widths[0] > widths[1] > widths[2]
    assert ends[2] == pytest.approx(2.03, rel=0.004)
    assert 0.9 < anew.inside < 0.999
    facts = {"step": 900, "level": 0.9, **vars(anew)}
    assert "above its forecast, inside the band; the end is forecast anew as 2.0" in (
        anew_text(facts, has_left=False)
    )


def test_a_loss_that_is_not_finite_is_passed_over():
    watch = Watch(BAND, STEPS)
    for step in range(100, 400):
        assert watch.see(step, math.nan) is None
    assert watch.state["means"] == []
