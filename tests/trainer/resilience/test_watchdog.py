"""Who is it that the others wait for: the answer as a pure function of beats, and the report."""

import os
import time

import pytest

from forescale.config.duration import Duration
from forescale.config.runtime import PulseConfig
from forescale.errors import CRASHED
from forescale.resilience import heartbeat
from forescale.resilience.diagnosis import WAITS, Hang, diagnose, publish, report, verdict, waits_of
from forescale.resilience.heartbeat import ENDED, Beat, Node, Seen, share
from forescale.resilience.stragglers import stragglers
from forescale.resilience.watchdog import Watchdog
from forescale.run.directory import Attempt, read_rows

LIMIT = 10.0
NOBODY = 2**22 + 1  # more than any process


def seen(rank, at, here=0.0, step=30, silence=0.0, host="a", phase="compute", **more):
    facts = dict(rank=rank, host=host, pid=NOBODY, began=0.0, time=time.time(), step=step)
    facts |= dict(phase=phase, at=at, here=here, limit=LIMIT, quiet=LIMIT, starting=False)
    return Seen(Beat(**(facts | more)), silence)


def sentence(*ranks, waits=WAITS, size=None):
    found = diagnose(ranks, size or len(ranks), waits)
    return found and found.sentence


def test_nobody_is_named_while_ranks_work():
    assert sentence(seen(0, "backward", 9), seen(1, "data", 9, step=29)) is None
    assert sentence(seen(0, "backward", 9, silence=9), seen(1, "word", 9)) is None


def test_the_one_that_is_in_data_while_others_wait():
    """Its step has not begun: the pulse still stands at the one before."""
    said = sentence(seen(0, "backward", 12), seen(1, "data", 12, step=29, host="b"))
    assert said == (
        "rank 1 on host b has been in data for 12 s at step 30; rank 0 waits in backward"
    )


def test_the_one_that_does_not_answer_comes_first():
    ranks = [seen(0, "data", 40, step=29), seen(1, "forward", silence=11, host="b")]
    ranks += [seen(2, "backward", 12), seen(3, "backward", 12)]
    assert sentence(*ranks) == (
        "rank 1 on host b has not answered for 11 s; last seen in forward at step 30; "
        "ranks 2, 3 wait in backward, rank 0 is in data"
    )


def test_one_that_is_silent_for_half_its_time_while_another_is_stuck():
    """A rank that waits for it is stuck a moment before it has been silent for long enough."""
    said = sentence(seen(0, "backward", 12), seen(1, "forward", silence=6, host="b"))
    assert said.startswith("rank 1 on host b has not answered for 6 s; last seen in forward at")


def test_the_one_at_the_lowest_step():
    found = diagnose([seen(0, "word", 12), seen(1, "backward", 12, step=28)], 2)
    assert (found.ranks, found.at, found.step, found.host) == ((1,), "backward", 28, "a")


def test_of_those_at_the_lowest_step_the_one_with_work_of_its_own():
    found = diagnose([seen(0, "norm", 12), seen(1, "forward", 12), seen(2, "word", 1, step=31)], 3)
    assert found.ranks == (1,)


def test_at_stage_3_forward_waits_too():
    ranks = [seen(0, "forward", 12), seen(1, "data", 12, step=29)]
    assert sentence(*ranks, waits=waits_of(3)).endswith("rank 0 waits in forward")
    assert diagnose(ranks, 2, waits_of(2)).ranks == (0, 1), "each has work of its own"


def test_whoever_waits_for_a_legitimate_long_phase_is_not_at_fault_nor_is_the_other():
    saving = seen(0, "checkpoint", 12, limit=1800.0)
    assert sentence(saving, seen(1, "word", 12), seen(2, "word", 12)) is None
    saving = seen(0, "checkpoint", 1801, limit=1800.0)
    assert sentence(saving, seen(1, "word", 1800)).startswith("rank 0 on host a has been in check")


def test_where_all_wait_the_collective_itself_hangs():
    assert sentence(*(seen(r, "backward", 12, host=f"n{r}") for r in range(3))) == (
        "ranks 0 to 2 on hosts n0, n1, n2 have been in backward for 12 s at step 30; "
        "nobody is behind: the collective itself hangs"
    )


def test_one_rank_alone():
    assert sentence(seen(0, "data", 12, step=29)) == (
        "rank 0 on host a has been in data for 12 s at step 30; nobody else is there to wait"
    )


def test_a_rank_that_never_came():
    begun = dict(step=0, starting=True)
    ranks = [seen(0, "startup", 12, **begun), seen(2, "startup", 11, **begun)]
    assert (
        sentence(*ranks, size=4) == "ranks 1 and 3 never came; ranks 0 and 2 wait since 11 s "
        "at startup"
    )
    assert diagnose(ranks[:1], 1).ranks == (0,)


def test_those_that_have_ended_are_not_waited_for():
    gone = seen(1, "data", 99, step=3, silence=99, phase=ENDED)
    assert sentence(gone, seen(0, "word", 1)) is None
    assert diagnose([gone, seen(0, "data", 12)], 2).ranks == (0,)


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(heartbeat, "_memory", lambda: tmp_path / "shm")
    path = tmp_path / "attempts" / "0003"
    path.mkdir(parents=True)
    return Attempt(path)


SETTINGS = PulseConfig(patience=Duration(10, "seconds"), beat=Duration(1, "seconds"))


@pytest.fixture
def watchdogs(attempt, monkeypatch):
    """Of ranks of this node, in a world of a size; their threads are not running."""
    monkeypatch.setattr("forescale.resilience.watchdog._ANSWER", 0.2)
    node, left = Node(attempt.path), []

    def make(rank, size):
        def leave(code):
            left.append((rank, code))

        made = Watchdog(node, attempt, rank, size, SETTINGS, WAITS, leave)
        made.host = "a"
        return made

    make.left = left
    return make


STUCK = [seen(0, "backward", 12), seen(1, "data", 12, step=29)]


def look(watchdog, ranks):
    watchdog.is_lost(ranks, 1.0)
    watchdog._look(ranks)


def test_the_lowest_that_answers_reports_and_all_leave(watchdogs, attempt, capfd):
    first, second = watchdogs(0, 2), watchdogs(1, 2)
    look(second, STUCK)
    assert not watchdogs.left
    look(first, STUCK)
    assert watchdogs.left == [(0, CRASHED)]
    assert first.node.is_over(), "which the others look at, at every beat"
    assert "hang: rank 1 on host a has been in data" in capfd.readouterr().err
    assert verdict(attempt.path).ranks == (1,)
    (event,) = read_rows(attempt.events.path)
    assert (event["kind"], event["ranks"], event["at"]) == ("hang", [1], "data")


def test_where_rank_0_does_not_answer_the_next_one_reports(watchdogs, attempt):
    ranks = [seen(0, "data", silence=12, step=29), seen(1, "backward", 12)]
    look(watchdogs(1, 2), ranks)
    assert watchdogs.left == [(1, CRASHED)]
    assert verdict(attempt.path).ranks == (0,)
    assert not attempt.events.path.exists(), "rank 0 alone writes there"


def test_a_report_has_the_stacks_of_those_that_answer(watchdogs, attempt):
    look(watchdogs(0, 2), [seen(0, "backward", 12, pid=os.getpid()), STUCK[1]])
    text = (attempt.path / "hang-a.txt").read_text()
    mine, other = text.split("Python stacks of rank 1:")
    assert "test_a_report_has_the_stacks" in mine
    assert "doesn't answer" in other


def test_the_first_verdict_stands(attempt):
    one, two = (Hang((r,), "a", "data", 1, 2.0, f"rank {r}") for r in (1, 2))
    assert publish(attempt.path, one) == one
    assert publish(attempt.path, two) == one
    assert verdict(attempt.path) == one
    assert [p.name for p in attempt.path.iterdir()] == ["hang.json"]


def test_a_node_that_hears_of_a_verdict_reports_and_leaves_too(watchdogs, attempt):
    publish(attempt.path, Hang((7,), "b", "data", 30, 12.0, "rank 7 on host b ..."))
    look(watchdogs(0, 8), [seen(0, "backward", 1)])
    assert watchdogs.left == [(0, CRASHED)]
    assert "rank 7 on host b" in (attempt.path / "hang-a.txt").read_text()


def test_over_nodes_the_shared_beats_say_who(watchdogs, attempt):
    """Node a waits; node b, with the guilty one, is read from the run's storage."""
    share(attempt.path, "b", [seen(1, "data", 12, step=29, host="b")])
    look(watchdogs(0, 2), [seen(0, "backward", 12)])
    assert verdict(attempt.path).sentence.startswith("rank 1 on host b has been in data")


def test_other_nodes_leave_the_first_word_to_the_first(watchdogs, attempt):
    share(attempt.path, "b", [seen(0, "data", 12, step=29, host="b")])
    watchdog = watchdogs(1, 2)
    look(watchdog, [seen(1, "backward", 12)])
    assert not watchdogs.left
    for _ in range(40):  # seconds: four times pulse.share, the second node's turn
        look(watchdog, [seen(1, "backward", 12)])
    assert verdict(attempt.path).ranks == (0,), "but not for ever"


def test_a_hang_of_the_storage_itself_ends_the_rank_without_a_report(watchdogs, capfd):
    watchdog = watchdogs(0, 2)
    assert not any(watchdog.is_lost([seen(0, "backward", 1)], 1.0) for _ in range(30))
    watchdog = watchdogs(0, 2)
    assert [watchdog.is_lost(STUCK, 1.0) for _ in range(11)][-1]
    assert "the run's storage doesn't answer" in capfd.readouterr().err


def test_a_report_says_what_every_rank_did():
    hang = diagnose(STUCK, 2)
    text = report(hang, STUCK, {0: "File a.py"})
    assert text.startswith(f"Hang: {hang.sentence}.\n")
    assert "rank 1 (host a" in text
    assert "in data, for 12.0 s" in text


def pace(rank, steps=20, **seconds):
    return seen(rank, "forward", pace={"backward": 1.0, **seconds}, steps=steps).beat


def test_slow_ranks_are_told_of_by_place():
    ranks = [pace(r, forward=0.2) for r in range(4)] + [pace(4, forward=0.5, data=0.4)]
    slow = stragglers(ranks, 1.5)
    assert [(s.rank, s.at) for s in slow] == [(4, "data"), (4, "forward")]
    assert slow[1].sentence == (
        "rank 4 on host a is slow: 500.0 ms a step in forward where the median of all is "
        "200.0 ms (2.5 times), over 20 steps"
    )
    assert [s.at for s in stragglers(ranks, 1.5, {"forward"})] == ["data"]


def test_of_two_ranks_the_slower_is_found():
    assert [s.rank for s in stragglers([pace(0, data=0.1), pace(1, data=0.5)], 1.5)] == [1]


def test_noise_makes_no_straggler():
    assert not stragglers([pace(0, data=1e-5), pace(1, data=1e-3)], 1.5), "a thousandth of a step"
    assert not stragglers([pace(0, data=0.1), pace(1, data=0.9, steps=5)], 1.5), "too few steps"
    assert not stragglers([pace(0, data=0.5)], 1.5), "alone"
    assert not stragglers([pace(0, norm=0.1), pace(1, norm=0.9)], 1.5), "it waits there"


def test_a_straggler_is_an_event_once_in_a_while(watchdogs, attempt, capfd):
    ranks = [Seen(pace(0, data=0.1), 0.0), Seen(pace(1, data=0.5), 0.0)]
    watchdog, other = watchdogs(0, 2), watchdogs(1, 2)
    for _ in range(3):
        watchdog._next_look = 0.0
        look(watchdog, ranks)
        look(other, ranks)
    (event,) = read_rows(attempt.events.path)
    assert (event["kind"], event["rank"], event["at"]) == ("straggler", 1, "data")
    assert capfd.readouterr().out.count("rank 1 on host a is slow") == 1
