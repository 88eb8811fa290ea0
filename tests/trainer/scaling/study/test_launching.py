"""The time that a launch still takes."""

from types import SimpleNamespace

import pytest

from forescale.scaling.study.directory import CellState
from forescale.scaling.study.launching import seconds_left


def state(steps: int, cost: float, status="complete", done=1.0) -> CellState:
    """A cell that takes 5 s, 10 ms a step and 1 s for each 1e10 FLOPs."""
    seconds = 5 + 0.01 * steps + 1e-10 * cost
    cell = SimpleNamespace(steps=steps, cost=cost)
    return CellState(cell, status, seconds=seconds if done == 1 else 0.0, done=done)


COMPLETE = [state(500, 1e10), state(900, 1e10), state(400, 4e10), state(1500, 3e10)]


def test_the_time_left_is_told_from_starts_steps_and_flops():
    left = [state(3000, 2e11, "ready", 0.0), state(1000, 1e11, "running", 0.5)]
    expected = (5 + 30 + 20 + 0.5 * (5 + 10 + 10)) / 2
    assert seconds_left([*COMPLETE, *left], 2) == pytest.approx(expected, rel=1e-6)
    assert seconds_left(COMPLETE, 2) == 0


def test_a_few_cells_tell_nothing():
    assert seconds_left([*COMPLETE[:3], state(3000, 2e11, "ready", 0.0)], 2) is None
