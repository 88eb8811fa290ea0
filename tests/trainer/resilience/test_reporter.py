"""A rank's heart over a pulse and a clock that the test moves: what it says, and whom it hears."""

import os
import time
from dataclasses import replace

import pytest

from forescale.config.duration import Duration
from forescale.config.runtime import PulseConfig
from forescale.resilience import heartbeat
from forescale.resilience.heartbeat import Beat, Node, Seen, share, shared, sweep
from forescale.resilience.phases import Pulse
from forescale.resilience.reporter import Heart
from forescale.run.directory import Attempt

SETTINGS = PulseConfig(
    patience=Duration(10, "seconds"),
    factor=3,
    startup=Duration(60, "seconds"),
    beat=Duration(1, "seconds"),
)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """In place of the node's own."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(heartbeat, "_memory", lambda: tmp_path / "shm")
    return tmp_path / "shm"


@pytest.fixture
def attempt(tmp_path):
    path = tmp_path / "run" / "attempts" / "0001"
    path.mkdir(parents=True)
    return Attempt(path)


@pytest.fixture
def heart(memory, clock, attempt):
    """Of rank 0 of two; its threads are not running: the test says when it ticks."""
    left = []
    made = Heart(Pulse("startup"), attempt, 0, 2, SETTINGS, leave=left.append)
    made.left = left
    return made


def beat(heart, clock, seconds=1.0):
    clock(seconds)
    heart._tick(min(seconds, 2 * heart.beat))
    return heart.node.read()[heart.rank][0]


def run_steps(heart, clock, *seconds):
    """Steps whose forward takes so long each."""
    for s in seconds:
        heart.pulse.step += 1
        heart.pulse.mark("forward")
        for _ in range(int(s)):
            beat(heart, clock)
        heart.pulse.mark("backward")
        beat(heart, clock, 0.1)


def test_it_says_where_the_rank_is_and_for_how_long(heart, clock):
    heart.pulse.step = 7
    heart.pulse.mark("forward")
    first, second = beat(heart, clock), beat(heart, clock)
    assert (second.rank, second.step, second.at, second.pid) == (0, 7, "forward", os.getpid())
    assert (first.here, second.here) == (1.0, 2.0)
    heart.pulse.mark("backward")
    assert beat(heart, clock).here == 1.0


def test_it_learns_how_long_places_take(heart, clock):
    run_steps(heart, clock, 30)
    assert beat(heart, clock).limit == 60, "the first step compiles"
    run_steps(heart, clock, 2, 8)
    heart.pulse.mark("forward")
    assert beat(heart, clock).limit == 3 * 8
    heart.pulse.mark("backward")
    assert beat(heart, clock).limit == 10, "never below pulse.patience"
    heart.pulse.mark("word")
    assert beat(heart, clock).limit == 60, "nobody knows yet"


def test_rare_long_phases_have_the_long_limit(heart, clock):
    run_steps(heart, clock, 1, 1)
    for phase in ("evaluation", "checkpoint"):
        with heart.pulse(phase):
            pass  # not due: this says nothing of how long it takes when it is
        with heart.pulse(phase):
            said = beat(heart, clock)
        assert said.limit == 60
        assert said.quiet == 10, "but it must answer"


def test_time_in_which_the_whole_process_stood_still_does_not_count(heart, clock):
    run_steps(heart, clock, 1, 1)
    heart.pulse.mark("backward")
    beat(heart, clock)
    said = beat(heart, clock, 10_000.0)
    assert said.here <= 3.0
    assert not Seen(said, 0.0).is_stuck


def test_silence_is_what_this_rank_lived_through(heart, clock):
    other = replace(beat(heart, clock), rank=1)
    heart.node.write(other)
    heart._look(1.0)
    assert heart._look(1.0)[1].silence == 1.0
    assert heart._look(2.0)[1].silence == 3.0
    heart.node.write(other)
    assert heart._look(1.0)[1].silence == 0.0
    assert [s.silence for s in heart._look(30.0)] == [0.0, 30.0], "its own doesn't count"
    assert heart._look(40.0)[1].is_silent


def test_the_place_of_a_stopped_rank_is_where_it_stopped(heart, clock):
    """Its last beat is from before."""
    other = replace(beat(heart, clock), rank=1, step=26, at="backward", here=5.0)
    pulse = Pulse("startup")
    pulse.mirror = heart.node.mirror(1)
    heart.node.write(other)
    assert heart.node.read()[1][0] == other, "it has said nothing finer yet"
    pulse.step = 29
    pulse.mark("data")
    found = heart.node.read()[1][0]
    assert (found.step, found.at, found.here) == (29, "data", 0.0)


def test_paces_are_of_the_last_steps(heart, clock):
    run_steps(heart, clock, 40, *[2] * 20)
    said = beat(heart, clock)
    assert said.steps == 19
    assert said.pace["forward"] == pytest.approx(2.0, abs=0.1)
    heart.pulse.step = 3  # rolled back
    assert beat(heart, clock).steps == 0


def test_a_real_heart_beats_and_clears_up(memory, attempt):
    settings = replace(SETTINGS, beat=Duration(0.02, "seconds"))
    pulse = Pulse("startup")
    hearts = [Heart(pulse, attempt, r, 2, settings, leave=pytest.fail) for r in (0, 1)]
    try:
        for heart in hearts:
            heart.start()
        node = hearts[0].node
        pulse.mark("forward")
        deadline = time.monotonic() + 20
        while [b.at for b, _ in node.read().values()] != ["forward"] * 2 or not shared(
            attempt.path
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        hearts[0].stop()
        assert node.read()[0][0].has_ended
        hearts[1].stop()
    assert not node.path.exists()
    assert [s.beat.has_ended for s in shared(attempt.path)] == [True, True]


def test_a_rank_that_is_asked_shows_where_its_threads_are_once(heart, clock):
    with open(heart.node.stacks(0), "wb", buffering=0) as heart._stacks:
        beat(heart, clock)
        heart.node.ask()
        beat(heart, clock)
        beat(heart, clock)
    text = heart.node.stacks(0).read_text()
    assert text.count("in test_a_rank_that_is_asked_shows_where_its_threads_are_once") == 1
    assert "Thread MainThread (most recent call first):" in text


def test_a_heart_that_fails_says_that_it_leaves(heart, clock, monkeypatch, capsys):
    """Else the others would take the rank for dead, and end the job."""
    monkeypatch.setattr(heart, "_tick", lambda lived: 1 / 0)
    heart._stopped.wait = lambda seconds: False
    heart._stacks = None
    heart._run()
    assert "trains on without a watchdog" in capsys.readouterr().err
    assert not heart.node.path.exists()  # it was the only one here


def test_one_file_a_node(tmp_path, heart, clock):
    said = beat(heart, clock)
    share(tmp_path, "a", [Seen(said, 0.0), Seen(replace(said, rank=1), 2.5)])
    share(tmp_path, "b", [Seen(replace(said, rank=2), 0.0)])
    share(tmp_path, "a", [Seen(said, 0.0), Seen(replace(said, rank=1), 3.5)])
    assert sorted(p.name for p in (tmp_path / "pulse").iterdir()) == ["a.json", "b.json"]
    seen = shared(tmp_path, every=60.0)
    assert [(s.beat.rank, s.silence) for s in seen] == [(0, 0.0), (1, 3.5), (2, 0.0)]
    assert [s.beat.rank for s in shared(tmp_path, without="a")] == [2]


def test_a_node_that_writes_no_more_is_silent(tmp_path, heart, clock, monkeypatch):
    share(tmp_path, "a", [Seen(beat(heart, clock), 1.0)])
    later = time.time() + 100
    monkeypatch.setattr(heartbeat.time, "time", lambda: later)
    assert shared(tmp_path, every=10.0)[0].silence == pytest.approx(81, abs=1)


def test_a_full_node_still_shows_signs_of_life(heart, clock, monkeypatch):
    beat(heart, clock)
    _, before = heart.node.read()[0]
    os.utime(heart.node._file(0), ns=(1, 1))
    full = lambda *a: (_ for _ in ()).throw(OSError(28, "full"))  # noqa: E731
    monkeypatch.setattr(heartbeat.os, "replace", full)
    heart.node.write(heart._beat())
    assert heart.node.read()[0][1] > before - 10**12 > 1


def test_what_dead_launches_left_is_swept(memory, attempt, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    node = Node(attempt.path)
    fields = {**dict.fromkeys(("rank", "step"), 0), **dict.fromkeys(("host", "phase", "at"), "x")}
    numbers = dict.fromkeys(("began", "time", "here", "limit", "quiet"), 0.0)
    node.write(Beat(**fields, **numbers, pid=os.getpid(), starting=False))
    long_ago = time.time() - 10_000

    def age():
        os.utime(node.path, (long_ago, long_ago))

    age()
    sweep()
    assert node.path.exists(), "its process lives"
    node.write(Beat(**fields, **numbers, pid=2**22 + 1, starting=False))
    sweep()
    assert node.path.exists(), "it was here a moment ago"
    age()
    sweep()
    assert not node.path.exists()


def test_launches_never_share_a_directory(memory, attempt, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    first = Node(attempt.path).path
    assert first.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("MASTER_PORT", "2")
    assert Node(attempt.path).path != first, "a run that was deleted and begun anew"
