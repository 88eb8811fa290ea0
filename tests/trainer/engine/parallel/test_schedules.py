"""The orders of a pipeline: complete, without a deadlock, and as idle as their papers say."""

from collections import Counter

import pytest

from forescale.config.pipeline import idle_share
from forescale.engine.parallel.schedules import order_of

KINDS = [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1)]


@pytest.mark.parametrize(("schedule", "chunks"), KINDS)
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_each_part_has_each_micro_batch_once_and_no_two_stages_wait_for_each_other(
    schedule, chunks, stages
):
    for micros in (1, 2, 3, 4, 5, 8, 13):
        actions = order_of(schedule, stages, chunks, micros).actions
        for stage, each in enumerate(actions):
            passes = Counter((kind, part, micro) for kind, part, micro, of in each if not of)
            parts = range(stage, stages * chunks, stages)
            kinds = "FIW" if schedule == "zero-bubble" else "FB"
            assert passes == {(k, p, m): 1 for k in kinds for p in parts for m in range(micros)}
        # As unbuffered messages: a pair of ranks meets in the order of both, so all run to the end.
        places = [0] * stages
        while any(place < len(each) for place, each in zip(places, actions, strict=True)):
            before = [*places]
            for stage, each in enumerate(actions):
                if places[stage] == len(each):
                    continue
                kind, part, micro, of = each[places[stage]]
                if not of:
                    places[stage] += 1
                elif kind == "send":
                    to = part + 1 if of == "F" else part - 1
                    other, got = to % stages, ("get", to, micro, of)
                    rest = actions[other][places[other] :]
                    if rest and rest[0] == got:
                        places[stage], places[other] = places[stage] + 1, places[other] + 1
            assert places != before, (schedule, stages, chunks, micros)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_stages_wait_as_long_as_the_papers_say(stages):
    for micros in (stages, 4 * stages):
        for schedule, chunks in KINDS:
            idle = idle_share(schedule, stages, chunks, micros)
            assert order_of(schedule, stages, chunks, micros).bubble == pytest.approx(idle)
        plain = order_of("1f1b", stages, 1, micros)
        assert [plain.in_flight(stage) for stage in range(stages)] == [*range(stages, 0, -1)]
        apart = order_of("zero-bubble", stages, 1, micros)
        assert {apart.in_flight(stage) for stage in range(stages)} == {stages}
