"""Saves of real ranks, by the main command: killed at any moment, left behind, moved from world to
world; always the same losses."""

import json
import os
import random
import signal
import struct
import time

import psutil
import pytest

from forescale.checkpoint.reader import Checkpoint
from forescale.ground.storage import check_table
from forescale.run.directory import Run
from tests import launching
from tests.matrix import full_only

pytestmark = pytest.mark.distributed


def length(steps, every):
    undue = f"validation.every={steps}"
    return ("train.tokens=null", f"train.steps={steps}", f"checkpoint.every={every}", undue)


def newest_attempt(run):
    """The newest attempt that has made a step."""
    return max((row["attempt"] for row in launching.rows(run)), default=0)


def await_attempt(process, trains):
    """The launcher, when its new attempt trains; or None where there is none any more: it was
    killed, or it gave up (76), as it must when three kills in a row come before a checkpoint."""
    deadline = time.monotonic() + 120
    while process is not None and not trains():
        if process.poll() is not None:
            assert process.returncode in (-signal.SIGKILL, 76), process.stdout.read()
            return None
        assert time.monotonic() < deadline, "in vain: a step of a new attempt"
        time.sleep(0.002)
    return process


def expect_whole(run):
    """Everything with a checkpoint's name, while the next one may be being written."""
    stored = Run(run)
    for step in stored.checkpoint_steps():
        faults = check_table(stored.checkpoint_path(step))
        assert not faults or not stored.checkpoint_path(step).exists(), faults


@pytest.mark.timeout(7200)
def test_a_run_killed_at_random_instants_ends_with_the_same_bits(dataset, tmp_path):
    """FORESCALE_JOB_KILLS says how often. Whoever is killed, the launcher, the template or a rank,
    while it trains or before: the run goes on from a whole checkpoint, by itself or by the same
    command."""
    kills, seed = int(os.environ.get("FORESCALE_JOB_KILLS", "3")), int.from_bytes(os.urandom(4))
    rng, run = random.Random(seed), tmp_path / "cut"
    print(f"seed {seed}")
    command = (f"data.path={dataset}", "launch.processes=2", *length(40 + 40 * kills, 3))
    launching.train(tmp_path, "run.name=whole", *command)
    process, killed, last, victims = None, 0, 0, []
    while killed < kills:
        newest = rng.choice([newest_attempt, lambda run: len(Run(run).attempts())])
        process = await_attempt(process, lambda: newest(run) > last)  # noqa: B023
        if process is None:
            process = launching.start(tmp_path, "run.name=cut", *command, cold=not killed)
            continue
        time.sleep(rng.uniform(0, 0.6))
        victim, there = rng.choice(["launcher", "template", 0, 1]), launching.ranks_of(process)
        there["template"] = launching.template_of(process)
        if victim != "launcher" and not there.get(victim):
            continue
        # A template that is killed before it has forked ranks costs its launcher no attempt.
        last = len(Run(run).attempts()) - (there.keys() == {"template"})
        if victim == "launcher":
            process.kill()
            process.communicate(timeout=60)
            while launching.processes(tmp_path):  # the ranks go with it
                time.sleep(0.1)
        else:
            there[victim].kill()
        expect_whole(run)
        killed += 1
        victims.append(victim)
    if process.poll() is None:
        output, _ = process.communicate(timeout=240)
        assert process.returncode in (0, 76), output
    launching.train(tmp_path, "run.name=cut", *command)
    whole, cut = (launching.trajectory(tmp_path / name) for name in ("whole", "cut"))
    assert len(whole) == 40 + 40 * kills
    assert cut == whole
    expect_whole(run)
    hidden = [p.name for p in (run / "checkpoints").glob(".*")]
    assert len(hidden) <= 1, hidden
    print(f"killed: {victims}; attempts: {len(list((run / 'attempts').iterdir()))}")


def test_an_old_attempt_that_wakes_up_changes_nothing(dataset, tmp_path):
    """A whole attempt, launcher and ranks, sleeps while a newer one goes on, and wakes up in the
    midst of it: what it still saves is refused or doesn't count, and the run is as undisturbed."""
    command = (f"data.path={dataset}", "launch.processes=2", *length(120, 5))
    launching.train(tmp_path, "run.name=whole", *command)
    old = launching.start(tmp_path, "run.name=cut", *command)
    run = tmp_path / "cut"
    launching.wait_until(old, lambda: any(r["step"] >= 12 for r in launching.rows(run)), "step 12")
    asleep = [psutil.Process(old.pid), *launching.ranks_of(old).values()]
    assert len(asleep) == 3
    for process in asleep:
        process.suspend()
    new = launching.start(tmp_path, "run.name=cut", *command)
    try:
        launching.wait_until(
            new,
            lambda: any(r["attempt"] == 2 and r["step"] >= 22 for r in launching.rows(run)),
            "step 22 of the second attempt",
        )
    finally:
        for process in asleep:
            process.resume()
    output, _ = new.communicate(timeout=240)
    assert new.returncode == 0, output
    last_output, _ = old.communicate(timeout=240)
    assert old.returncode == 2, last_output
    assert "attempt 2 started before step" in last_output
    assert "Traceback" not in last_output
    assert launching.trajectory(run) == launching.trajectory(tmp_path / "whole")
    assert len(list((run / "attempts").iterdir())) == 2
    checkpoints = [Checkpoint(p) for p in sorted((run / "checkpoints").glob("step-*"))]
    # Two as checkpoint.keep says, and the last one before the decay.
    assert [(c.position.step, c.attempt) for c in checkpoints] == [(95, 2), (115, 2), (120, 2)]
    assert not list((run / "checkpoints").glob(".*"))


def ulps(a: float, b: float) -> int:
    """Return how many fp32 numbers lie between two losses."""
    x, y = (struct.unpack("<i", struct.pack("<f", value))[0] for value in (a, b))
    return abs(x - y)


@pytest.mark.timeout(1200)  # a CPU without AVX-512 or AMX computes bf16 100 times slower than fp32
@pytest.mark.parametrize(
    ("precision", "optimizer", "bound"),
    [("fp32", "adamw", 8), pytest.param("bf16", "muon", 1 << 14, marks=full_only)],
)
def test_a_chain_over_worlds_of_4_2_1_and_2_ranks(dataset, tmp_path, precision, optimizer, bound):
    """The same tokens at each step, and the same losses within `bound` ULP of fp32 against a run
    that stays on 4 ranks. To the bit: all steps before the first move, and the one after it, for
    its loss is of the same weights and the same micro-batches."""
    kind = (f"precision={precision}", f"optimizer={optimizer}", "engine=zero1")
    base = (f"data.path={dataset}", *kind, *length(48, 12))
    launching.train(tmp_path, "run.name=still", *base, "launch.processes=4")
    run = tmp_path / "moving"
    moves = [(4, 12), (2, 24), (1, 36), (2, 48)]
    for ranks, end in moves:
        command = ("run.name=moving", *base, f"launch.processes={ranks}")
        if end == 48:
            launching.train(tmp_path, *command)
        else:
            process = launching.start(tmp_path, *command)
            published = run / "checkpoints" / f"step-{end:08d}"
            launching.wait_until(process, published.exists, f"the checkpoint at {end}")
            process.kill()
            process.communicate(timeout=60)
            while launching.processes(tmp_path):
                time.sleep(0.1)
            launching.keep_only(run, end)
    moving, still = launching.rows(run), launching.rows(tmp_path / "still")
    parents = [
        json.loads((a / "parent.json").read_text())["step"]
        for a in sorted((run / "attempts").iterdir())
    ]
    assert parents == [0, 12, 24, 36]
    for key in ("step", "g0", "g1", "tokens", "tokens_hash"):
        assert [row[key] for row in moving] == [row[key] for row in still]
    apart = [ulps(a["loss"], b["loss"]) for a, b in zip(moving, still, strict=True)]
    print(f"{precision}, {optimizer}: ULP apart, step by step: {apart}")
    assert apart[:13] == [0] * 13
    assert [r["loss"] for r in moving[:13]] == [r["loss"] for r in still[:13]]
    assert max(apart) <= bound
