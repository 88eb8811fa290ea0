"""Faults that are injected into real ranks, once: a rank that hangs is named while the others wait
for it, and the run resumes bit for bit."""

import json
import re
import signal
import time

import pytest

from forescale.ground.storage import read_json
from forescale.monitor.goodput import Goodput
from forescale.resilience import outcome
from forescale.resilience.diagnosis import read_hang
from forescale.resilience.injector import records
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from tests import launching
from tests.matrix import full_only

pytestmark = pytest.mark.distributed

TWO = ("launch.processes=2", "train.tokens=null", "train.steps=40", "checkpoint.every=10")
TWO = (*TWO, "validation.every=40")
QUICK = ("heartbeat.patience='3 s'",)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The trajectory of an undisturbed run."""
    folder = tmp_path_factory.mktemp("runs")
    launching.train(folder, "run.name=whole", f"data.path={dataset}", *TWO)
    return launching.trajectory(folder / "whole")


def struck(run):
    """The time at which the fault was injected, in seconds since the epoch."""
    (path,) = run.glob("attempts/0001/faults-rank-*.jsonl")
    return read_rows(path)[0]["time"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        pytest.param(
            "freeze@25:rank1:data",
            "rank 1 on host .* not answered .* last seen in data at step 25",
            marks=full_only,
        ),
        ("freeze@25:rank1:forward", "rank 1 .* last seen in forward at step 25; rank 0 waits in"),
        pytest.param(
            "freeze@25:rank1:backward",
            "rank 1 .* last seen in backward at step 25; rank 0 waits in",
            marks=full_only,
        ),
        pytest.param(
            "freeze@20:rank1:checkpoint",
            "rank 1 .* last seen in checkpoint at step 20",
            marks=full_only,
        ),
        ("freeze@25:rank0:backward", "rank 0 .* last seen in backward at step 25; rank 1 waits in"),
        ("hang@25:rank1:data", "rank 1 .* been in data for [34] s at step 25; rank 0 waits in"),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_run_resumes(dataset, tmp_path, whole, fault, sentence):
    command = ("run.name=cut", f"data.path={dataset}", *TWO, *QUICK, f"faults=[{fault}]")
    output = launching.train(tmp_path, *command, cold="freeze@25:rank0" in fault)
    run, rank = tmp_path / "cut", int(fault.split("rank")[1][0])
    hang = read_hang(run / "attempts/0001")
    assert hang.ranks == (rank,)
    assert re.search(sentence, hang.sentence), hang.sentence
    assert hang.sentence in output
    assert (run / "attempts/0001/hang.json").stat().st_mtime - struck(run) < 10
    reports = list(run.glob("attempts/0001/hang-*.txt"))
    assert len(reports) == 1, output
    (report,) = reports
    stacks = report.read_text().split("Python stacks of rank ")
    for other in (0, 1):
        answers = "freeze" not in fault or other != rank
        assert ("most recent call first" in stacks[1 + other]) == answers
        assert ("no answer" in stacks[1 + other]) != answers
    assert ("hang" in launching.events(run)) == (rank != 0), "rank 0 writes the events"
    assert "Restarting" in output
    assert not launching.processes(tmp_path)
    assert launching.trajectory(run) == whole


def test_a_rank_that_waits_for_data_ends_when_the_grace_time_is_over(dataset, tmp_path, whole):
    """Rank 1 is in data for ever, rank 0 waits in backward: neither sees the stop request."""
    command = ("run.name=cut", f"data.path={dataset}", *TWO, "launch.grace='3 s'")
    run = tmp_path / "cut"
    process = launching.start(tmp_path, *command, "faults=[hang@25:rank1:data]")
    came = lambda: list(run.glob("attempts/0001/faults-rank-*.jsonl"))  # noqa: E731
    launching.wait_until(process, came, "the fault")
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert time.monotonic() - began < 20
    assert "save and exit within 3 s" in output
    assert not launching.processes(tmp_path)
    assert Run(run).checkpoint_steps()[-1] == 20
    launching.train(tmp_path, *command)
    assert launching.trajectory(run) == whole


def test_a_fault_inside_a_collective_ends_all_ranks(dataset, tmp_path, whole):
    command = ("run.name=cut", f"data.path={dataset}", *TWO, "faults=[exit@25:rank1:backward]")
    output = launching.train(tmp_path, *command)
    run = tmp_path / "cut"
    assert "rank 1 ended with Injected: the fault exit@25:rank1:backward" in output
    facts = read_json(run / "attempts/0001" / outcome.LAUNCH)
    assert facts["ended"] - struck(run) < 20
    assert not launching.processes(tmp_path)
    assert launching.trajectory(run) == whole


def test_a_crash_loop_gives_up_with_the_reason(dataset, tmp_path):
    faults = "faults=[exit@3:rank1,exit@4:rank1,exit@5:rank1]"
    command = ("run.name=loop", f"data.path={dataset}", *TWO, faults)
    output = launching.train(tmp_path, *command, code=76)
    last = output.strip().splitlines()[-1]
    assert last.startswith("Gave up after 3 crashes without a new checkpoint. Likely cause: rank 1")
    assert "Injected: the fault exit@5:rank1" in last
    assert not launching.processes(tmp_path)


def test_a_slow_rank_is_reported(dataset, tmp_path):
    command = ("run.name=slow", f"data.path={dataset}", *TWO, "heartbeat.patience='2 s'")
    command = (*command, "faults=[slow@8:rank1:data]")
    output = launching.train(tmp_path, *command)
    assert re.search(r"rank 1 on host .* is slow: \d+\.\d ms per step in data", output)
    events = (tmp_path / "slow/attempts/0001/events.jsonl").read_text().splitlines()
    reported = [e for e in map(json.loads, events) if e["kind"] == "straggler"]
    (slow,) = [e for e in reported if (e["rank"], e["at"]) == (1, "data")]
    assert slow["seconds"] > 1.5 * slow["median"]


def test_every_second_falls_in_a_bucket(dataset, tmp_path):
    """After a crash, a hang, a launcher that was killed with its ranks, and a wait."""
    command = ("run.name=cut", f"data.path={dataset}", *TWO, *QUICK)
    command = (*command, "faults=[kill@15:rank1:backward,freeze@25:rank1:forward]")
    began = time.time()
    process = launching.start(tmp_path, *command)
    launching.interrupt(process, tmp_path / "cut", 33, signal.SIGKILL)
    launching.train(tmp_path, *command)
    ended = time.time()
    goodput = Goodput(Run(tmp_path / "cut"))
    assert len(goodput.launches) == 4
    assert goodput.failures == 3
    wall = goodput.launches[-1].ended - goodput.launches[0].begun
    assert sum(goodput.buckets.values()) == pytest.approx(wall, rel=0.01)
    assert began < goodput.launches[0].begun < goodput.launches[-1].ended < ended
    assert min(goodput.buckets.values()) >= 0
    assert goodput.buckets["lost"] > 3, "the hang"
    assert goodput.lost_steps >= 3 + 3 + 3  # a row is written when its step is known to all
    assert 0 < goodput.ettr < 1
    last = goodput.launches[-1]
    assert 0 < last.recorded < last.ended - last.begun
    rows = launching.rows(tmp_path / "cut")
    compute = sum(row["seconds"]["compute"] for row in rows)
    after = sum(launch.after.get("compute", 0.0) for launch in goodput.launches)
    assert goodput.buckets["compute"] == pytest.approx(compute + after)


def test_ranks_are_killed_and_the_run_resumes_bit_for_bit(dataset, tmp_path, whole):
    faults = "faults=[kill@15:rank1:norm,kill@30:write]"
    command = ("run.name=struck", f"data.path={dataset}", *TWO, faults)
    output = launching.train(tmp_path, *command, cold=True)
    assert output.count("ended with SIGKILL") == 2
    faults_struck = [row["fault"] for row in records(Run(tmp_path / "struck"))]
    assert faults_struck == ["kill@15:rank1:norm", "kill@30:rank0:write"]
    assert launching.trajectory(tmp_path / "struck") == whole
    assert launching.train(tmp_path, *command)  # nothing strikes again


def test_a_full_disk_gives_one_sentence_and_the_same_command_resumes(dataset, tmp_path):
    command = ("run.name=full", f"data.path={dataset}", *TWO, "faults=[enospc@20:rank1]")
    output = launching.train(tmp_path, *command, code=2)
    assert "the disk is full" in output
    assert "Traceback" not in output
    assert Run(tmp_path / "full").checkpoint_steps() == [10]
    launching.train(tmp_path, *command)
    assert [row["step"] for row in launching.rows(tmp_path / "full")] == list(range(1, 41))
