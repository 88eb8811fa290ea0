"""What is computed between the launch of a collective and the wait for it."""

import pytest

from forescale.plan.links import Collective
from forescale.rehearsal.device import Stream
from forescale.rehearsal.timeline import Timeline

SUM = Collective("", "all_reduce", 100, 8)


@pytest.fixture
def timeline(monkeypatch):
    monkeypatch.setattr(Stream, "joined", None)
    timeline = Timeline()
    timeline.seconds_of = lambda _: 4.0
    return timeline


def test_a_collective_is_beside_what_is_computed_before_its_wait(timeline):
    timeline.begin(None, 1, SUM)
    timeline.compute(7, 1.0)
    timeline.wait(1)
    timeline.compute(7, 9.0)
    assert timeline.rows == {("all_reduce", 8): {"calls": 1, "flops": 7, "exposed": 75}}


def test_the_wait_of_another_stream_counts_where_the_computation_waits_for_it(timeline):
    other, third = Stream(), Stream()
    with other:
        timeline.begin(None, 1, SUM)
        timeline.wait(1)
        timeline.compute(50, 50.0)  # beside the computation
    timeline.compute(7, 1.0)
    third.wait_stream(other)
    timeline.compute(7, 1.0)
    assert timeline.rows == {}
    event = third.record_event()
    Stream.main.wait_event(event)
    assert timeline.rows == {("all_reduce", 8): {"calls": 1, "flops": 14, "exposed": 50}}


def test_what_nothing_waits_for_ends_with_the_step(timeline):
    timeline.begin(None, 1, SUM)
    timeline.compute(7, 5.0)
    timeline.end()
    assert timeline.rows["all_reduce", 8]["exposed"] == 0


def test_collectives_of_as_many_ranks_go_one_after_the_other(timeline):
    timeline.begin(None, 1, SUM)
    timeline.compute(7, 2.0)
    timeline.begin(None, 2, SUM)
    timeline.compute(7, 2.0)  # the first has ended
    timeline.wait(1)
    timeline.wait(2)  # and the second began only then: 4 more seconds
    assert timeline.rows == {("all_reduce", 8): {"calls": 2, "flops": 21, "exposed": 100}}
