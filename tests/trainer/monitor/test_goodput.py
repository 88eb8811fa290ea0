"""Every second of a run's wall clock falls in one bucket, whatever its launches came to."""

import math
import os

import pytest

from forescale.ground.errors import DONE, INTERRUPTED, USER
from forescale.ground.storage import write_json
from forescale.monitor.goodput import BUCKETS, Goodput, optimal_interval, wasted
from forescale.resilience import heartbeat, outcome
from forescale.resilience.heartbeat import Heartbeat, RankStatus, write_node
from forescale.run.directory import Parent, Run

T0 = 1_700_000_000.0


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def launch(run, begun, ended=None, code=None, came=0, rank_began=None, how=None, **further):
    """An attempt that our launcher began at T0 + begun; came: the step that it went on from;
    rank_began: when rank 0 did; how: its last beat, where it left any; further: for launch.json."""
    attempt = run.new_attempt()
    facts = {"begun": T0 + begun, "command": [], "host": "a", "processes": 1} | further
    if ended is not None:
        facts |= {"ended": T0 + ended, "code": code, "how": "so"}
    write_json(attempt.path / outcome.LAUNCH, facts)
    if how is not None or rank_began is not None:
        beat(attempt, rank_began or begun, begun if how is None else how)
    attempt.start_from(Parent(came, f"checkpoints/step-{came}" if came else None), run)
    return attempt


def beat(attempt, began, at):
    facts = dict(host="a", pid=1, step=1, phase="compute", at="norm", here=0.0, starting=False)
    one = Heartbeat(rank=0, began=T0 + began, time=T0 + at, limit=1.0, quiet=1.0, **facts)
    write_node(attempt.path, "a", [RankStatus(one, 0.0)])


def row(attempt, step, **seconds):
    attempt.metrics.add(
        {"kind": "train", "step": step, "attempt": attempt.number, "seconds": seconds}
    )


def ended(attempt, reason, at, **seconds):
    attempt.event("ended", step=0, reason=reason, seconds=seconds)
    os.utime(attempt.events.path, (T0 + at, T0 + at))


def buckets(run, **options):
    goodput = Goodput(run, **options)
    assert sum(goodput.buckets.values()) == pytest.approx(goodput.wall, abs=1e-6)
    assert min(goodput.buckets.values()) >= 0
    assert goodput.buckets.keys() <= BUCKETS.keys()
    return goodput


def test_a_run_that_nothing_happened_to(run):
    one = launch(run, 0, 31, DONE, rank_began=2)
    row(one, 1, startup=6.0, data=1.0, compute=10.0)
    row(one, 2, data=0.5, compute=5.0, logging=0.5)
    ended(one, "complete", 30, evaluation=3.0, checkpoint=2.0)
    seconds = buckets(run)
    expected = {"compute": 15.0, "data": 1.5, "evaluation": 3.0, "checkpoint": 2.0, "logging": 0.5}
    assert seconds.buckets == expected | {"startup": 6.0 + 3.0}
    assert (seconds.wall, seconds.ettr, seconds.failures, seconds.mtbf) == (31.0, 15 / 31, 0, None)


def test_a_run_whose_size_changes_counts_the_seconds_of_its_ranks(run):
    """Four ranks, of which memory leaves two; then eight, on two nodes."""
    one = launch(run, 0, 40, -9, processes=4)
    for step in (1, 2, 3):
        row(one, step, startup=3.0 * (step == 1), compute=10.0)
    two = launch(run, 41, 75, INTERRUPTED, came=2, processes=2, limit="memory ran out at 4 ranks")
    row(two, 3, startup=4.0, compute=20.0)
    ended(two, "interrupted", 74)
    three = launch(run, 80, 99, DONE, came=3, processes=8, slurm={"nodes": ["a", "b"]})
    row(three, 4, startup=5.0, compute=5.0)
    row(three, 5, compute=5.0, data=1.0)
    ended(three, "complete", 98)
    goodput = buckets(run)
    spent = {"compute": 4 * 20 + 2 * 20 + 8 * 10, "data": 8 * 1, "startup": 4 * 3}
    spent |= {"recovery": 2 * 14 + 8 * 8, "lost": 4 * 17}
    assert goodput.rank_seconds == pytest.approx(spent)
    assert sum(spent.values()) == 4 * 40 + 2 * 34 + 8 * 19, "all of what the launches held"
    history = [(s.first, s.last, s.ranks, s.nodes, s.seconds) for s in goodput.sizes]
    assert history == [(1, 2, 4, 1, 20.0), (3, 3, 2, 1, 20.0), (4, 5, 8, 2, 11.0)]
    assert [span.why for span in goodput.sizes] == ["", "memory ran out at 4 ranks", ""]


@pytest.mark.parametrize(("code", "why"), [(1, "so"), (INTERRUPTED, "")])
def test_fewer_ranks_are_due_to_a_failure_before_but_not_to_an_interruption(run, code, why):
    launch(run, 0, 20, code, processes=2)
    row(run.attempts()[0], 1, compute=10.0)
    row(launch(run, 30, 50, DONE, came=1, processes=1), 2, compute=10.0)
    assert [span.why for span in buckets(run).sizes] == ["", why]


def test_a_crash_loses_its_steps_and_its_tail(run):
    """Steps 3 and 4 are made again; what the first launch did after its last row is lost too."""
    one = launch(run, 0, 40, 1, rank_began=2)
    row(one, 1, startup=8.0, compute=5.0)
    for step in (2, 3, 4):
        row(one, step, data=1.0, compute=4.0)
    two = launch(run, 43, 70, DONE, came=2, rank_began=44)
    row(two, 3, startup=6.0, compute=5.0)
    row(two, 4, compute=5.0)
    ended(two, "complete", 70, checkpoint=1.0)
    seconds = buckets(run)
    assert seconds.buckets == {
        "compute": 5.0 + 4.0 + 10.0,
        "data": 1.0,
        "checkpoint": 1.0,
        "startup": 8.0 + 2.0,  # of the first launch
        "recovery": 6.0 + 10.0,  # of the second
        "lost": 10.0 + (40 - 2 - 28),
        "waiting": 3.0,
    }
    assert (seconds.failures, seconds.lost_steps, seconds.mtbf) == (1, 2, 67.0)


def test_a_launch_that_died_before_its_first_step_is_lost(run):
    launch(run, 0, 20, -9)
    two = launch(run, 21, 40, INTERRUPTED)
    row(two, 1, startup=8.0, compute=5.0)
    ended(two, "interrupted", 39)
    seconds = buckets(run)
    assert seconds.buckets["lost"] == 20.0
    assert seconds.failures == 1


YEARS = 3e8


@pytest.mark.parametrize("jump", [1.0, -1.0, 3600.0, -3600.0, YEARS, -YEARS])
@pytest.mark.parametrize("rank_began", [2.0, None])  # the clock is set before rank 0 begins, or not
def test_a_clock_that_is_set_in_a_launch_makes_it_no_longer_and_no_shorter(run, jump, rank_began):
    began = rank_began or 2.0 + jump
    one = launch(run, 0, 31 + jump, 1, rank_began=began)
    row(one, 1, startup=6.0, compute=10.0)
    outcome.add_to_launch(one.path, seconds=31.0)
    two = launch(run, 40 + jump, 60 + jump, DONE, came=1, rank_began=41 + jump)
    row(two, 2, startup=6.0, compute=10.0)
    outcome.add_to_launch(two.path, seconds=20.0)
    assert (buckets(run).wall, buckets(run).buckets["waiting"]) == (60.0, 9.0)
    for attempt, monotonic in ((one, 100.0), (two, 150.0)):  # between two launches it is set, too
        outcome.add_to_launch(attempt.path, process="boot:1", monotonic=monotonic)
    outcome.add_to_launch(two.path, begun=T0 - jump, slurm={"eligible": T0 - 2 * YEARS})
    goodput = buckets(run)
    assert (goodput.wall, goodput.buckets["queue"], goodput.mtbf) == (70.0, 19.0, 51.0)
    assert 0 <= goodput.launches[0].head <= 15.0


def test_a_fault_of_the_users_is_no_failure_of_the_machine(run):
    one = launch(run, 0, 20, USER)
    row(one, 1, startup=8.0, compute=5.0)
    assert (buckets(run).failures, buckets(run).buckets["lost"]) == (0, 7.0)


def test_a_launch_that_nobody_saw_end_ends_with_its_last_sign(run):
    """The launcher was killed too; the last beat that was shared tells how long it lived."""
    one = launch(run, 0, rank_began=1, how=50)
    row(one, 1, startup=8.0, compute=5.0)
    two = launch(run, 100, 120, DONE, came=0)
    row(two, 1, startup=8.0, compute=5.0)
    ended(two, "complete", 119)
    seconds = buckets(run)
    assert seconds.buckets["waiting"] == 50.0
    assert seconds.buckets["lost"] == (50 - 1 - 13) + 5.0
    assert seconds.failures == 1


def test_what_runs_now_has_lost_nothing(run):
    one = launch(run, 0, rank_began=1, how=50)
    row(one, 1, startup=8.0, compute=5.0)
    assert "lost" not in buckets(run, running=True).buckets
    assert buckets(run, running=True).failures == 0


def test_a_rollback_is_recovery_inside_one_launch(run):
    one = launch(run, 0, 60, DONE, rank_began=1)
    for step in (1, 2, 3):
        row(one, step, compute=10.0)
    ended(one, "rollback", 31)
    two = run.new_attempt()
    two.start_from(Parent(1, "checkpoints/step-1", ((2, 3),), rolled_back_from=3), run)
    beat(two, 1, 55)
    row(two, 2, recovery=4.0, compute=10.0)
    ended(two, "complete", 58, checkpoint=2.0)
    seconds = buckets(run)
    assert [len(launch.attempts) for launch in seconds.launches] == [2]
    assert seconds.buckets == {
        "compute": 20.0,
        "checkpoint": 2.0,
        "startup": 60.0 - 46.0,
        "recovery": 4.0,
        "lost": 20.0,
    }
    assert (seconds.failures, seconds.lost_steps) == (0, 2)


@pytest.mark.parametrize("code", [DONE, INTERRUPTED, None])
def test_the_same_command_on_a_complete_run_changes_no_number(run, code):
    """A day later, and twice; the last with an evaluation that was still missing, which counts."""
    one = launch(run, 0, 31, DONE, rank_began=2)
    row(one, 1, startup=6.0, data=1.0, compute=10.0)
    ended(one, "complete", 30, checkpoint=2.0)
    before = buckets(run)
    launch(run, 86_400, 86_410, code, came=1)
    launch(run, 172_800, 172_810, code, came=1)
    after = buckets(run)
    assert (after.buckets, after.wall, after.ettr) == (before.buckets, before.wall, before.ettr)
    assert (after.failures, after.alive) == (0, 31.0)
    four = launch(run, 200_000, 200_020, DONE, came=1)
    ended(four, "complete", 200_019, evaluation=5.0)
    assert buckets(run).buckets["evaluation"] == 5.0


def test_without_a_launcher_of_ours_the_beats_say_when_it_began(run):
    attempt = run.new_attempt()
    beat(attempt, 0, 15)
    attempt.start_from(Parent(0), run)
    row(attempt, 1, startup=8.0, compute=5.0)
    ended(attempt, "complete", 14, checkpoint=1.0)
    os.utime(attempt.path)
    goodput = Goodput(run)
    (only,) = goodput.launches
    assert only.begun == T0
    assert only.code == DONE


def test_an_empty_attempt_counts_for_nothing(run):
    run.new_attempt()
    goodput = Goodput(run)
    assert (goodput.launches, goodput.buckets, goodput.wall, goodput.ettr) == ([], {}, 0.0, 0.0)
    assert goodput.interval() is None


@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_optimal_interval_is_dalys(mtbf, minutes):
    """Figures 3 to 5 of the paper, each with a stall of 5 minutes."""
    assert optimal_interval(5.0, mtbf) == pytest.approx(minutes, rel=0.006)


def test_the_optimal_interval_at_its_limits():
    """Young's is that of a short stall."""
    assert optimal_interval(1e-6, 1e6) == pytest.approx(math.sqrt(2.0), rel=1e-3)
    assert optimal_interval(500, 200) == 200


def test_it_is_the_one_that_wastes_least():
    stall, mtbf = 20.0, 10_000.0

    def exact(interval):
        """Seconds for a second of work, failures being a Poisson process (Daly 2006)."""
        return mtbf * (math.exp((interval + stall) / mtbf) - 1) / interval

    best = min(range(100, 3000), key=exact)
    assert optimal_interval(stall, mtbf) == pytest.approx(best, rel=0.005)
    assert wasted(best, stall, 0.0, mtbf) == pytest.approx(exact(best) - 1, rel=0.1)


def test_a_proposal_from_a_runs_own_numbers(run):
    one = launch(run, 0, 1000, 1, rank_began=2)
    row(one, 1, startup=8.0, compute=5.0)
    for step in range(2, 101):
        row(one, step, data=1.0, compute=4.0, checkpoint=0.1)
    for step in (50, 100):
        one.event("checkpoint_saved", step=step)
    interval = Goodput(run).interval()
    assert interval.stall == pytest.approx(9.9 / 2)
    assert (interval.restart, interval.mtbf) == (10.0, 1000.0)
    assert interval.seconds == pytest.approx(optimal_interval(9.9 / 2, 1000.0))
    assert interval.steps == round(interval.seconds / 5.0)
    write_json(one.path / outcome.LAUNCH, {"begun": T0, "ended": T0 + 1000, "code": 75})
    assert Goodput(run).interval() is None, "nothing has shown how often failures come"
    launch(run, 1010, 1020, 1, came=100)
    assert Goodput(run).failures == 1
    assert Goodput(run).interval() is None, "it failed before it trained"


def test_beats_that_cannot_be_read_are_no_beats(run):
    one = launch(run, 0, 31, DONE, rank_began=2)
    (one.path / "heartbeat" / "a.json").write_text("{")
    assert not heartbeat.read_nodes(one.path)
    row(one, 1, startup=6.0, compute=10.0)
    assert buckets(run).buckets["startup"] == 21.0


def test_time_in_a_queue_is_not_time_between_launches(run):
    """Eligible at 5 and begun at 25; requeued at 60, eligible once more at 65, begun at 80."""
    for begun, ends, eligible in ((25, 60, 5), (80, 100, 65)):
        attempt = launch(run, begun, ends, INTERRUPTED)
        record = outcome.launch_of(attempt.path)
        write_json(attempt.path / outcome.LAUNCH, {**record, "slurm": {"eligible": T0 + eligible}})
    seconds = buckets(run)
    assert seconds.buckets["queue"] == 20 + 15
    assert seconds.buckets["waiting"] == 5
    assert seconds.wall == 95
