"""Every second falls in one phase."""

import time

import pytest

from trainer.pulse import Pulse


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: clock(seconds)."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def forward(seconds):
        now[0] += seconds

    return forward


def test_phases_add_up_to_the_wall_clock(clock):
    pulse = Pulse("startup", began=98.0)  # before anything of ours was imported
    clock(1)
    with pulse("compute"):
        clock(5)
    clock(0.5)

    def items():
        for i in range(3):
            clock(0.25)
            yield i

    for _ in pulse.each("data", items()):
        with pulse("compute"):
            clock(2)
        clock(0.125)
    taken = pulse.take()
    assert taken == {"startup": 3.875, "compute": 11.0, "data": 0.75}
    assert sum(taken.values()) == time.monotonic() - 98
    clock(3)
    assert pulse.take() == {"startup": 3.0}, "what was taken is counted twice"


def test_a_phase_ends_with_an_error_too(clock):
    pulse = Pulse("startup")

    def fail():
        clock(1)
        raise ValueError("of the batch")

    with pytest.raises(ValueError, match="of the batch"), pulse("compute"):
        fail()
    clock(2)
    assert pulse.take() == {"compute": 1.0, "startup": 2.0}


def test_the_real_clock():
    began = time.monotonic()
    pulse = Pulse("startup", began)
    with pulse("a"):
        time.sleep(0.02)
    taken = pulse.take()
    assert sum(taken.values()) == pytest.approx(time.monotonic() - began, abs=0.01)
    assert taken["a"] >= 0.02
