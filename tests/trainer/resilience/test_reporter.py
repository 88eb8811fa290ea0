"""The heartbeat reporter of a rank, with a clock that the test moves."""

import os
import time
from dataclasses import replace

import pytest

from forescale.config.duration import Duration
from forescale.config.sections.runtime import HeartbeatConfig
from forescale.ground import storage
from forescale.resilience import heartbeat
from forescale.resilience.heartbeat import (
    Heartbeat,
    NodeDirectory,
    RankStatus,
    read_nodes,
    remove_stale,
    write_node,
)
from forescale.resilience.phases import PhaseTimer
from forescale.resilience.reporter import HeartbeatReporter
from forescale.run.directory import Attempt

SETTINGS = HeartbeatConfig(
    patience=Duration(10, "seconds"), factor=3, startup=Duration(60, "seconds")
)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A directory in place of the node memory."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(storage, "_memory", lambda: tmp_path / "shm")
    return tmp_path / "shm"


@pytest.fixture
def attempt(tmp_path):
    path = tmp_path / "run" / "attempts" / "0001"
    path.mkdir(parents=True)
    return Attempt(path)


@pytest.fixture
def reporter(memory, clock, attempt):
    """The reporter of rank 0 of two, without threads: the test makes it tick."""
    left = []
    new = HeartbeatReporter(PhaseTimer("startup"), attempt, 0, 2, SETTINGS, leave=left.append)
    new.left, new.interval = left, 1.0
    return new


def tick(reporter, clock, seconds=1.0):
    clock(seconds)
    reporter._tick(min(seconds, 2 * reporter.interval))
    return reporter.node.read()[reporter.rank][0]


def run_steps(reporter, clock, *seconds):
    """Make steps whose forwards take `seconds`."""
    for s in seconds:
        reporter.phases.step += 1
        reporter.phases.mark("forward")
        for _ in range(int(s)):
            tick(reporter, clock)
        reporter.phases.mark("backward")
        tick(reporter, clock, 0.1)


def test_a_heartbeat_has_the_place_and_the_time_there(reporter, clock):
    reporter.phases.step = 7
    reporter.phases.mark("forward")
    first, second = tick(reporter, clock), tick(reporter, clock)
    assert (second.rank, second.step, second.at, second.pid) == (0, 7, "forward", os.getpid())
    assert (first.here, second.here) == (1.0, 2.0)
    reporter.phases.mark("backward")
    assert tick(reporter, clock).here == 1.0


def test_limits_follow_the_longest_visit_of_a_place(reporter, clock):
    run_steps(reporter, clock, 30)
    assert tick(reporter, clock).limit == 60, "the first step compiles"
    run_steps(reporter, clock, 2, 8)
    reporter.phases.mark("forward")
    assert tick(reporter, clock).limit == 3 * 8
    reporter.phases.mark("backward")
    assert tick(reporter, clock).limit == 10, "never below heartbeat.patience"
    reporter.phases.mark("summary")
    assert tick(reporter, clock).limit == 60, "no visit is known yet"


def test_rare_phases_have_the_long_limit(reporter, clock):
    run_steps(reporter, clock, 1, 1)
    for phase in ("evaluation", "checkpoint"):
        with reporter.phases(phase):
            pass  # not due: this says nothing of how long it takes when it is
        with reporter.phases(phase):
            beat = tick(reporter, clock)
        assert beat.limit == 60
        assert beat.quiet == 10, "but it must answer"


def test_a_long_evaluation_lives_as_long_as_its_micro_batches_go_on(reporter, clock):
    """1 % of 1e12 tokens takes longer than any limit; a micro-batch of it never does."""
    run_steps(reporter, clock, 1, 1)
    with reporter.phases("evaluation"):
        for _ in range(4):
            reporter.phases.mark("evaluation")
            statuses = [RankStatus(tick(reporter, clock), 0.0) for _ in range(50)]
            assert not any(status.is_stuck for status in statuses)
        statuses = [RankStatus(tick(reporter, clock), 0.0) for _ in range(101)]
        assert statuses[-1].is_stuck, "beyond three times the longest micro-batch without a mark"


def test_time_while_the_process_was_suspended_does_not_count(reporter, clock):
    run_steps(reporter, clock, 1, 1)
    reporter.phases.mark("backward")
    tick(reporter, clock)
    beat = tick(reporter, clock, 10_000.0)
    assert beat.here <= 3.0
    assert not RankStatus(beat, 0.0).is_stuck


def test_silence_counts_only_while_this_process_runs(reporter, clock):
    other = replace(tick(reporter, clock), rank=1)
    reporter.node.write(other)
    reporter._read_node(1.0)
    assert reporter._read_node(1.0)[1].silence == 1.0
    assert reporter._read_node(2.0)[1].silence == 3.0
    reporter.node.write(other)
    assert reporter._read_node(1.0)[1].silence == 0.0
    assert [s.silence for s in reporter._read_node(30.0)] == [0.0, 30.0], "its own doesn't count"
    assert reporter._read_node(40.0)[1].is_silent


def test_the_place_of_a_stopped_rank_is_where_it_stopped(reporter, clock):
    """Its last heartbeat is older."""
    other = replace(tick(reporter, clock), rank=1, step=26, at="backward", here=5.0)
    phases = PhaseTimer("startup")
    phases.mirror = reporter.node.mirror(1)
    reporter.node.write(other)
    assert reporter.node.read()[1][0] == other, "no newer place is known yet"
    phases.step = 29
    phases.mark("data")
    beat = reporter.node.read()[1][0]
    assert (beat.step, beat.at, beat.here) == (29, "data", 0.0)


def test_the_pace_covers_the_last_steps(reporter, clock):
    run_steps(reporter, clock, 40, *[2] * 20)
    beat = tick(reporter, clock)
    assert beat.steps == 19
    assert beat.pace["forward"] == pytest.approx(2.0, abs=0.1)
    reporter.phases.step = 3  # rolled back
    assert tick(reporter, clock).steps == 0


def test_real_threads_write_heartbeats_and_clear_up(memory, attempt):
    settings = replace(SETTINGS, patience=Duration(0.8, "seconds"))  # a heartbeat each 0.02 s
    phases = PhaseTimer("startup")
    reporters = [
        HeartbeatReporter(phases, attempt, r, 2, settings, leave=pytest.fail) for r in (0, 1)
    ]
    try:
        for reporter in reporters:
            reporter.start()
        node = reporters[0].node
        phases.mark("forward")
        deadline = time.monotonic() + 20
        while [b.at for b, _ in node.read().values()] != ["forward"] * 2 or not read_nodes(
            attempt.path
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        reporters[0].stop()
        assert node.read()[0][0].has_ended
        reporters[1].stop()
    assert not node.path.exists()
    assert [s.heartbeat.has_ended for s in read_nodes(attempt.path)] == [True, True]


def test_requested_stacks_are_written_once(reporter, clock):
    with open(reporter.node.stacks(0), "wb", buffering=0) as reporter._stacks:
        tick(reporter, clock)
        reporter.node.request_stacks()
        tick(reporter, clock)
        tick(reporter, clock)
    text = reporter.node.stacks(0).read_text()
    assert text.count("in test_requested_stacks_are_written_once") == 1
    assert "Thread MainThread (most recent call first):" in text


def test_a_failing_reporter_announces_its_end(reporter, clock, monkeypatch, capsys):
    """Otherwise the others would take the rank for dead and end the job."""
    monkeypatch.setattr(reporter, "_tick", lambda elapsed: 1 / 0)
    reporter._stopped.wait = lambda seconds: False
    reporter._stacks = None
    reporter._run()
    assert "trains on without a watchdog" in capsys.readouterr().err
    assert not reporter.node.path.exists()  # it was the only one here


def test_one_file_per_node(tmp_path, reporter, clock):
    beat = tick(reporter, clock)
    write_node(tmp_path, "a", [RankStatus(beat, 0.0), RankStatus(replace(beat, rank=1), 2.5)])
    write_node(tmp_path, "b", [RankStatus(replace(beat, rank=2), 0.0)])
    write_node(tmp_path, "a", [RankStatus(beat, 0.0), RankStatus(replace(beat, rank=1), 3.5)])
    assert sorted(p.name for p in (tmp_path / "heartbeat").iterdir()) == ["a.json", "b.json"]
    statuses = read_nodes(tmp_path, every=60.0)
    assert [(s.heartbeat.rank, s.silence) for s in statuses] == [(0, 0.0), (1, 3.5), (2, 0.0)]
    assert [s.heartbeat.rank for s in read_nodes(tmp_path, without="a")] == [2]


def test_a_node_that_stops_writing_is_silent(tmp_path, reporter, clock, monkeypatch):
    write_node(tmp_path, "a", [RankStatus(tick(reporter, clock), 1.0)])
    later = time.time() + 100
    monkeypatch.setattr(heartbeat.time, "time", lambda: later)
    assert read_nodes(tmp_path, every=10.0)[0].silence == pytest.approx(81, abs=1)


def test_a_full_node_still_shows_signs_of_life(reporter, clock, monkeypatch):
    tick(reporter, clock)
    _, before = reporter.node.read()[0]
    os.utime(reporter.node._file(0), ns=(1, 1))
    full = lambda *a: (_ for _ in ()).throw(OSError(28, "full"))  # noqa: E731
    monkeypatch.setattr(heartbeat.os, "replace", full)
    reporter.node.write(reporter._heartbeat())
    assert reporter.node.read()[0][1] > before - 10**12 > 1


def test_what_dead_launches_left_is_swept(memory, attempt, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    node = NodeDirectory(attempt.path)
    fields = {**dict.fromkeys(("rank", "step"), 0), **dict.fromkeys(("host", "phase", "at"), "x")}
    numbers = dict.fromkeys(("began", "time", "here", "limit", "quiet"), 0.0)
    node.write(Heartbeat(**fields, **numbers, pid=os.getpid(), starting=False))
    long_ago = time.time() - 10_000
    monkeypatch.setenv("MASTER_PORT", "2")
    current = NodeDirectory(attempt.path)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # the clock has just been set

    def age():
        os.utime(node.path, (long_ago, long_ago))

    age()
    remove_stale(current)
    assert node.path.exists(), "its process lives"
    node.write(Heartbeat(**fields, **numbers, pid=2**22 + 1, starting=False))
    remove_stale(current)
    assert node.path.exists(), "it was here a moment ago"
    age()
    remove_stale(current)
    assert (node.path.exists(), current.path.exists()) == (False, True)


def test_launches_never_share_a_directory(memory, attempt, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    first = NodeDirectory(attempt.path).path
    assert first.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("MASTER_PORT", "2")
    assert NodeDirectory(attempt.path).path != first, "a run that was deleted and begun anew"
