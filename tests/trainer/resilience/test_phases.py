"""Every second falls in one phase."""

import time

import pytest

from forescale.resilience.phases import PLACE, PhaseTimer


def test_phases_add_up_to_the_wall_clock(clock):
    phases = PhaseTimer("startup", began=98.0)  # before anything of ours was imported
    clock(1)
    with phases("compute"):
        clock(5)
    clock(0.5)

    def items():
        for i in range(3):
            clock(0.25)
            yield i

    for _ in phases.each("data", items()):
        with phases("compute"):
            clock(2)
        clock(0.125)
    taken = phases.take()
    assert taken == {"startup": 3.875, "compute": 11.0, "data": 0.75}
    assert sum(taken.values()) == time.monotonic() - 98
    clock(3)
    assert phases.take() == {"startup": 3.0}, "what was taken is counted twice"


def test_a_phase_ends_with_an_error_too(clock):
    phases = PhaseTimer("startup")

    def fail():
        clock(1)
        raise ValueError("of the batch")

    with pytest.raises(ValueError, match="of the batch"), phases("compute"):
        fail()
    clock(2)
    assert phases.take() == {"compute": 1.0, "startup": 2.0}


def test_the_real_clock():
    began = time.monotonic()
    phases = PhaseTimer("startup", began)
    with phases("a"):
        time.sleep(0.02)
    taken = phases.take()
    assert sum(taken.values()) == pytest.approx(time.monotonic() - began, abs=0.01)
    assert taken["a"] >= 0.02


def test_places_are_counted_apart_and_learnt_from_the_second_step_on(clock):
    phases = PhaseTimer("startup")
    clock(5)
    for seconds in (20, 2, 7, 1):
        phases.step += 1
        with phases("compute"):
            phases.mark("forward")
            clock(seconds)
            phases.mark("backward")
            clock(1)
    assert phases.spent == {"startup": 5.0, "compute": 0.0, "forward": 30.0, "backward": 4.0}
    assert phases.longest == {"startup": 0.0, "compute": 0.0, "forward": 7.0, "backward": 1.0}
    assert phases.take() == {"startup": 5.0, "compute": 34.0}


def test_others_see_the_place_as_it_changes():
    phases = PhaseTimer("startup")
    phases.mirror = bytearray(PLACE.size)
    phases.step = 12
    phases.mark("forward")
    assert PLACE.unpack(phases.mirror) == (12, b"forward".ljust(24, b"\0"))
    with phases("data"):
        pass
    assert PLACE.unpack(phases.mirror)[1].rstrip(b"\0") == b"startup"
