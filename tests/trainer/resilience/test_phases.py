"""Every second falls in one phase."""

import time

import pytest

from forescale.resilience.phases import PLACE, Pulse


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


def test_places_are_counted_apart_and_learnt_from_the_second_step_on(clock):
    pulse = Pulse("startup")
    clock(5)
    for seconds in (20, 2, 7, 1):
        pulse.step += 1
        with pulse("compute"):
            pulse.mark("forward")
            clock(seconds)
            pulse.mark("backward")
            clock(1)
    assert pulse.spent == {"startup": 5.0, "compute": 0.0, "forward": 30.0, "backward": 4.0}
    assert pulse.longest == {"startup": 0.0, "compute": 0.0, "forward": 7.0, "backward": 1.0}
    assert pulse.take() == {"startup": 5.0, "compute": 34.0}


def test_others_see_the_place_as_it_changes():
    pulse = Pulse("startup")
    pulse.mirror = bytearray(PLACE.size)
    pulse.step = 12
    pulse.mark("forward")
    assert PLACE.unpack(pulse.mirror) == (12, b"forward".ljust(24, b"\0"))
    with pulse("data"):
        pass
    assert PLACE.unpack(pulse.mirror)[1].rstrip(b"\0") == b"startup"
