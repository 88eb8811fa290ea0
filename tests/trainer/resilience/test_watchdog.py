"""Who is it that the others wait for: the answer as a pure function of beats, and the report."""

import os
import subprocess
import sys
import time

import pytest

from forescale.config.duration import Duration
from forescale.config.sections.runtime import HeartbeatConfig
from forescale.ground import storage
from forescale.ground.errors import CRASHED
from forescale.resilience.diagnosis import (
    WAITING_PLACES,
    Hang,
    diagnose,
    hang_report,
    publish_hang,
    read_hang,
    stragglers,
    waiting_places,
)
from forescale.resilience.heartbeat import ENDED, Heartbeat, NodeDirectory, RankStatus, write_node
from forescale.resilience.outcome import process_mark
from forescale.resilience.watchdog import Watchdog
from forescale.run.directory import Attempt
from forescale.run.rows import read_rows

LIMIT = 10.0
NOBODY = 2**22 + 1  # more than any process


def status(rank, at, here=0.0, step=30, silence=0.0, host="a", phase="compute", **fields):
    facts = dict(rank=rank, host=host, pid=NOBODY, began=0.0, time=time.time(), step=step)
    facts |= dict(phase=phase, at=at, here=here, limit=LIMIT, quiet=LIMIT, starting=False)
    return RankStatus(Heartbeat(**(facts | fields)), silence)


BEGUN = dict(step=0, starting=True)
DIAGNOSES = {
    "ranks work": ([status(0, "backward", 9), status(1, "data", 9, step=29)], None),
    "ranks answer": ([status(0, "backward", 9, silence=9), status(1, "summary", 9)], None),
    # Of a rank in data the step has not begun: the phases still stand at the one before.
    "one is in data while others wait": (
        [status(0, "backward", 12), status(1, "data", 12, step=29, host="b")],
        "rank 1 on host b has been in data for 12 s at step 30; rank 0 waits in backward",
    ),
    "one that does not answer comes first": (
        [
            status(0, "data", 40, step=29),
            status(1, "forward", silence=11, host="b"),
            *(status(rank, "backward", 12) for rank in (2, 3)),
        ],
        "rank 1 on host b has not answered for 11 s; last seen in forward at step 30; "
        "ranks 2, 3 wait in backward, rank 0 is in data",
    ),
    # A rank that waits for it is stuck a moment before it has been silent for long enough.
    "one is silent for half its time while another is stuck": (
        [status(0, "backward", 12), status(1, "forward", silence=6, host="b")],
        "rank 1 on host b has not answered for 6 s; last seen in forward at step 30; "
        "rank 0 waits in backward",
    ),
    "the lowest step": (
        [status(0, "summary", 12), status(1, "backward", 12, step=28)],
        "rank 1 on host a has been in backward for 12 s at step 28; rank 0 waits in summary",
    ),
    "of those at the lowest step the one with work of its own": (
        [status(0, "norm", 12), status(1, "forward", 12), status(2, "summary", 1, step=31)],
        "rank 1 on host a has been in forward for 12 s at step 30; rank 0 waits in norm, "
        "rank 2 waits in summary",
    ),
    "a long phase is within its limit": (
        [status(0, "checkpoint", 12, limit=1800.0), *(status(r, "summary", 12) for r in (1, 2))],
        None,
    ),
    "a long phase is beyond its limit": (
        [status(0, "checkpoint", 1801, limit=1800.0), status(1, "summary", 1800)],
        "rank 0 on host a has been in checkpoint for 1801 s at step 30; rank 1 waits in summary",
    ),
    "all wait": (
        [status(r, "backward", 12, host=f"n{r}") for r in range(3)],
        "ranks 0 to 2 on hosts n0, n1, n2 have been in backward for 12 s at step 30; "
        "no rank is behind: the collective itself hangs",
    ),
    # Not those of the one that has been there longest.
    "each has its own place and step": (
        [status(0, "backward", 12), status(1, "data", 12, step=29), status(2, "forward", 14)],
        "ranks 1, 2 on host a have not moved for 12 to 14 s: rank 1 in data at step 30, "
        "rank 2 in forward at step 30; rank 0 waits in backward",
    ),
    "several are silent": (
        [
            status(0, "backward", 12),
            status(1, "norm", silence=21),
            *(status(rank, "norm", step=31, silence=20 + rank) for rank in (2, 3)),
        ],
        "ranks 1 to 3 on host a have not answered for 21 to 23 s; last seen: rank 1 in norm at "
        "step 30, ranks 2, 3 in norm at step 31; rank 0 waits in backward",
    ),
    "one rank alone": (
        [status(0, "data", 12, step=29)],
        "rank 0 on host a has been in data for 12 s at step 30; no other rank waits",
    ),
    "one has ended, and one works": (
        [status(1, "data", 99, step=3, silence=99, phase=ENDED), status(0, "summary", 1)],
        None,
    ),
    "one has ended, and one hangs": (
        [status(1, "data", 99, step=3, silence=99, phase=ENDED), status(0, "data", 12)],
        "rank 0 on host a has been in data for 12 s at step 31; no other rank waits",
    ),
}


@pytest.mark.parametrize("name", DIAGNOSES)
def test_the_ranks_that_the_others_wait_for_are_named(name):
    ranks, sentence = DIAGNOSES[name]
    hang = diagnose(ranks, len(ranks))
    assert (hang and hang.sentence) == sentence


def test_a_diagnosis_has_its_facts_as_fields():
    hang = diagnose(DIAGNOSES["each has its own place and step"][0], 3)
    fields = (hang.ranks, hang.host, hang.at, hang.step, hang.seconds)
    assert fields == ((1, 2), "a", "forward", 30, 14)


def test_a_rank_that_never_started():
    ranks = [status(0, "startup", 12, **BEGUN), status(2, "startup", 11, **BEGUN)]
    assert diagnose(ranks, 4).sentence == (
        "ranks 1 and 3 never started; ranks 0 and 2 have waited for 11 to 12 s in startup"
    )
    assert diagnose(ranks[:1], 1).ranks == (0,)


def test_in_a_pipeline_a_stage_is_blamed_and_named():
    ranks = [status(0, "stream", 12, stage=0), status(1, "backward", 12, stage=1)]
    assert diagnose(ranks, 2, waiting_places(1, in_pipeline=True)).sentence == (
        "rank 1 (stage 1) on host a has been in backward for 12 s at step 30; "
        "rank 0 waits in stream"
    )
    paces = ({"forward": 1.0}, {"forward": 3.0}, {"forward": 1.0}, {"forward": 1.1})
    beats = [
        status(rank, "data", stage=rank % 2, pace=pace, steps=20).heartbeat
        for rank, pace in enumerate(paces)
    ]
    (slow,) = stragglers(beats, 1.5)
    assert slow.sentence.startswith("rank 1 (stage 1) on host a is slow")


def test_at_stage_3_forward_waits_too():
    ranks = [status(0, "forward", 12), status(1, "data", 12, step=29)]
    for waits in (waiting_places(3), waiting_places(1, exchanges=True)):
        assert diagnose(ranks, 2, waits).sentence.endswith("rank 0 waits in forward")
    assert diagnose(ranks, 2, waiting_places(2)).ranks == (0, 1), "each has work of its own"


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(storage, "_memory", lambda: tmp_path / "shm")
    path = tmp_path / "attempts" / "0003"
    path.mkdir(parents=True)
    return Attempt(path)


SETTINGS = HeartbeatConfig(patience=Duration(10, "seconds"))


@pytest.fixture
def watchdogs(attempt, monkeypatch):
    """Returns a function that makes the watchdog of a rank of this node, without its thread."""
    monkeypatch.setattr("forescale.resilience.watchdog._ANSWER", 0.2)
    node, left = NodeDirectory(attempt.path), []

    def make(rank, size):
        def leave(code):
            left.append((rank, code))

        watchdog = Watchdog(node, attempt, rank, size, SETTINGS, WAITING_PLACES, leave)
        watchdog.host = "a"
        return watchdog

    make.left = left
    return make


STUCK = [status(0, "backward", 12), status(1, "data", 12, step=29)]


def look(watchdog, ranks):
    watchdog.is_stuck_on_storage(ranks, 1.0)
    watchdog._look(ranks)


def test_the_lowest_answering_rank_reports_and_all_ranks_exit(watchdogs, attempt, capfd):
    first, second = watchdogs(0, 2), watchdogs(1, 2)
    look(second, STUCK)
    assert not watchdogs.left
    look(first, STUCK)
    assert watchdogs.left == [(0, CRASHED)]
    assert first.node.exit_is_requested(), "the others read this at every heartbeat"
    assert "hang: rank 1 on host a has been in data" in capfd.readouterr().err
    assert read_hang(attempt.path).ranks == (1,)
    (event,) = read_rows(attempt.events.path)
    assert (event["kind"], event["ranks"], event["at"]) == ("hang", [1], "data")


def test_the_next_rank_reports_if_rank_0_does_not_answer(watchdogs, attempt):
    ranks = [status(0, "data", silence=12, step=29), status(1, "backward", 12)]
    look(watchdogs(1, 2), ranks)
    assert watchdogs.left == [(1, CRASHED)]
    assert read_hang(attempt.path).ranks == (0,)
    assert not attempt.events.path.exists(), "only rank 0 writes events"


def test_a_report_has_the_stacks_of_the_ranks_that_answer(watchdogs, attempt):
    look(watchdogs(0, 2), [status(0, "backward", 12, pid=os.getpid()), STUCK[1]])
    text = (attempt.path / "hang-a.txt").read_text()
    mine, other = text.split("Python stacks of rank 1:")
    assert "test_a_report_has_the_stacks" in mine
    assert "no answer" in other


def test_a_silent_rank_is_asked_for_its_stack_though_the_clock_was_put_back(watchdogs, attempt):
    """By the clock it began after its last heartbeat."""
    watchdog, code = watchdogs(0, 2), "import faulthandler, signal, sys, time\n"
    code += "faulthandler.register(signal.SIGUSR2, open(sys.argv[1], 'wb', 0))\n"
    code += "print(flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", code, watchdog.node.stacks(1)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as silent:
        silent.stdout.readline()
        facts = dict(pid=silent.pid, process=process_mark(silent.pid), time=1.0)
        look(watchdog, [status(0, "backward", 12), status(1, "forward", silence=11, **facts)])
        silent.kill()
    _, other = (attempt.path / "hang-a.txt").read_text().split("Python stacks of rank 1:")
    assert 'File "<string>"' in other


def test_the_first_diagnosis_stands(attempt):
    one, two = (Hang((r,), "a", "data", 1, 2.0, f"rank {r}") for r in (1, 2))
    assert publish_hang(attempt.path, one) == one
    assert publish_hang(attempt.path, two) == one
    assert read_hang(attempt.path) == one
    assert [p.name for p in attempt.path.iterdir()] == ["hang.json"]


def test_a_node_that_reads_a_diagnosis_reports_and_exits_too(watchdogs, attempt):
    publish_hang(attempt.path, Hang((7,), "b", "data", 30, 12.0, "rank 7 on host b ..."))
    look(watchdogs(0, 8), [status(0, "backward", 1)])
    assert watchdogs.left == [(0, CRASHED)]
    assert "rank 7 on host b" in (attempt.path / "hang-a.txt").read_text()


def test_across_nodes_the_shared_heartbeats_show_the_hanging_rank(watchdogs, attempt):
    """NodeDirectory a waits; node b, with the guilty one, is read from the run's storage."""
    write_node(attempt.path, "b", [status(1, "data", 12, step=29, host="b")])
    look(watchdogs(0, 2), [status(0, "backward", 12)])
    assert read_hang(attempt.path).sentence.startswith("rank 1 on host b has been in data")


def test_other_nodes_give_the_first_node_time_to_diagnose(watchdogs, attempt):
    write_node(attempt.path, "b", [status(0, "data", 12, step=29, host="b")])
    watchdog = watchdogs(1, 2)
    look(watchdog, [status(1, "backward", 12)])
    assert not watchdogs.left
    for _ in range(10):  # seconds: four times share_interval, the second node's turn
        look(watchdog, [status(1, "backward", 12)])
    assert read_hang(attempt.path).ranks == (0,), "but not for ever"


def test_a_hang_of_the_storage_ends_the_rank_without_a_report(watchdogs, capfd):
    watchdog = watchdogs(0, 2)
    assert not any(watchdog.is_stuck_on_storage([status(0, "backward", 1)], 1.0) for _ in range(30))
    watchdog = watchdogs(0, 2)
    assert [watchdog.is_stuck_on_storage(STUCK, 1.0) for _ in range(11)][-1]
    assert "the run's storage doesn't answer" in capfd.readouterr().err


def test_a_report_states_what_every_rank_did():
    hang = diagnose(STUCK, 2)
    text = hang_report(hang, STUCK, {0: "File a.py"})
    assert text.startswith(f"Hang: {hang.sentence}.\n")
    assert "rank 1 (host a" in text
    assert "in data, for 12.0 s" in text


def pace(rank, steps=20, **seconds):
    return status(rank, "forward", pace={"backward": 1.0, **seconds}, steps=steps).heartbeat


def test_slow_ranks_are_reported_by_place():
    ranks = [pace(r, forward=0.2) for r in range(4)] + [pace(4, forward=0.5, data=0.4)]
    slow = stragglers(ranks, 1.5)
    assert [(s.rank, s.at) for s in slow] == [(4, "data"), (4, "forward")]
    assert slow[1].sentence == (
        "rank 4 on host a is slow: 500.0 ms per step in forward, where the median of all ranks is "
        "200.0 ms (2.5 times), over 20 steps"
    )
    assert [s.at for s in stragglers(ranks, 1.5, {"forward"})] == ["data"]


def test_the_slower_of_two_ranks_is_found():
    assert [s.rank for s in stragglers([pace(0, data=0.1), pace(1, data=0.5)], 1.5)] == [1]


def test_noise_makes_no_straggler():
    assert not stragglers([pace(0, data=1e-5), pace(1, data=1e-3)], 1.5), "a thousandth of a step"
    assert not stragglers([pace(0, data=0.1), pace(1, data=0.9, steps=5)], 1.5), "too few steps"
    assert not stragglers([pace(0, data=0.5)], 1.5), "alone"
    assert not stragglers([pace(0, norm=0.1), pace(1, norm=0.9)], 1.5), "it waits there"


def test_a_straggler_is_reported_once_in_five_minutes(watchdogs, attempt, capfd):
    ranks = [RankStatus(pace(0, data=0.1), 0.0), RankStatus(pace(1, data=0.5), 0.0)]
    watchdog, other = watchdogs(0, 2), watchdogs(1, 2)
    for _ in range(3):
        watchdog._next_look = 0.0
        look(watchdog, ranks)
        look(other, ranks)
    (event,) = read_rows(attempt.events.path)
    assert (event["kind"], event["rank"], event["at"]) == ("straggler", 1, "data")
    assert capfd.readouterr().out.count("rank 1 on host a is slow") == 1
