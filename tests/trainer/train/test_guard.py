"""Decisions on simulated runs: what is anomalous, what is done, and that a resumed guard decides as
one that was never stopped."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.config.sections.runtime import GuardConfig
from forescale.data.mixture import merged_intervals
from forescale.train.guard import Guard, Window

RULES = GuardConfig(loss_spike="rollback", gradient_spike="skip", window=32, warmup=16)


def noise(count, seed=0, level=4.0, spread=0.1):
    return np.random.default_rng(seed).normal(level, spread, count).tolist()


def settled(rules=RULES, rollbacks=(), steps=40):
    guard = Guard(rules, rollbacks)
    for step, (loss, norm) in enumerate(zip(noise(steps), noise(steps, 1, 1.0), strict=True), 1):
        assert guard.judge(step, loss, norm).action == "apply"
    return guard


def test_the_score_is_that_of_a_normal_distribution():
    window = Window(1001, noise(1001, level=10.0, spread=2.0))
    assert window.score(16.0) == pytest.approx(3.0, rel=0.1)
    assert window.score(4.0) == pytest.approx(-3.0, rel=0.1)


def test_a_quarter_of_outliers_does_not_hide_a_spike():
    values = noise(96) + [1e6] * 32
    assert Window(128, values).score(8.0) > 20


@pytest.mark.parametrize(
    ("loss", "norm", "action", "says"),
    [
        (4.1, 1.1, "apply", ""),
        (0.1, 0.0, "apply", ""),  # lower is no spike
        (9.0, 1.0, "rollback", "the loss is 9"),
        (4.0, 50.0, "skip", "the gradient norm is 50"),
        (9.0, 50.0, "rollback", "the loss"),  # the stronger of the two
        (math.nan, 1.0, "skip", "the loss is not finite"),
        (4.0, math.inf, "skip", "the gradient is not finite"),
    ],
)
def test_the_action_and_its_reason(loss, norm, action, says):
    decision = settled().judge(41, loss, norm)
    assert decision.action == action
    assert says in decision.reason
    assert decision.may_apply == (action == "apply")


def test_spikes_are_not_detected_before_there_are_values_to_compare_with():
    guard = settled(steps=RULES.warmup - 1)
    assert guard.judge(16, 1e9, 1e9).action == "apply"
    assert Guard(RULES).judge(1, math.nan, 1.0).action == "skip"  # but this is always anomalous


def test_a_nearly_constant_value_has_no_spikes_of_a_percent():
    guard = Guard(RULES)
    for step in range(40):
        guard.judge(step, 4.0, 1.0)
    assert guard.judge(40, 4.02, 1.005).action == "apply"


def test_a_noted_value_is_remembered_and_a_changed_level_becomes_usual():
    guard = settled(replace(RULES, loss_spike="note"))
    actions = [guard.judge(step, 9.0, 1.0).action for step in range(41, 41 + 2 * RULES.window)]
    assert actions[0] == "note"
    assert actions[-1] == "apply"


def test_anomalous_steps_in_a_row_stop_the_run_and_a_healthy_one_resets_the_count():
    guard = settled(replace(RULES, patience=3))
    for _ in range(2):
        assert [guard.judge(41, math.nan, 1.0).action for _ in range(3)] == ["skip"] * 3
        assert guard.judge(42, 4.0, 1.0).action == "apply"
    assert [guard.judge(43, math.nan, 1.0).action for _ in range(4)][-1] == "halt"


def test_rollbacks_are_few_and_far_between():
    rules = replace(RULES, cooldown=10, most_rollbacks=2)
    assert settled(rules, [35]).judge(45, 9.0, 1.0).action == "skip"
    assert settled(rules, [35]).judge(46, 9.0, 1.0).action == "rollback"
    assert settled(rules, [5, 20]).judge(46, 9.0, 1.0).action == "halt"


@given(
    st.lists(
        st.tuples(st.floats(0, 100) | st.just(math.nan), st.floats(0, 10) | st.just(math.inf)),
        max_size=80,
    ),
    st.integers(0, 80),
)
def test_a_guard_restored_anywhere_decides_as_one_that_was_never_stopped(values, cut):
    rules = replace(RULES, window=12, warmup=8, patience=1000)
    whole, first = Guard(rules), Guard(rules)
    decisions = [whole.judge(step, *value) for step, value in enumerate(values)]
    for step, value in enumerate(values[:cut]):
        first.judge(step, *value)
    second = Guard(rules, state=json.loads(json.dumps(first.state)))
    again = [second.judge(step, *v) for step, v in list(enumerate(values))[cut:]]
    assert again == decisions[cut:]
    assert second.state == whole.state


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=8))
def test_united_intervals_hold_the_same_samples_sorted_and_apart(pairs):
    intervals = [(a, a + n) for a, n in pairs]
    united = merged_intervals(intervals)
    assert {g for a, b in united for g in range(a, b)} == {
        g for a, b in intervals for g in range(a, b)
    }
    assert all(b < c for (_, b), (c, _) in pairwise(united))
