"""`train.invariant` on real ranks: the same bits at any number of them.

FORESCALE_MATRIX=full takes 50 steps of each stage with each optimizer and number format.
"""

import json
import os
import signal

import pytest

from tests import launching
from tests.distributed import ranks
from tests.matrix import FULL

pytestmark = pytest.mark.distributed

KINDS = [
    [stage, optimizer, precision, False]
    for stage in range(4)
    for optimizer in ("adamw", "muon", "lion")
    for precision in ("fp32", "bf16")
]
KINDS += [[stage, "adamw", "fp32", True] for stage in (1, 2, 3)]
CHOSEN = KINDS if FULL else [KINDS[i] for i in (0, 3, 9, 12, 17, 18, 21, 25)]


def test_any_number_of_ranks_makes_the_same_steps():
    steps = 50 if FULL else 8
    results = {
        size: ranks.run("invariant_scenarios:trained", size, cases=CHOSEN, steps=steps)
        for size in (1, 2, 3, 4)  # of which 3 and 4 don't divide ten micro-batches
    }
    for i, case in enumerate(CHOSEN):
        for size in (2, 3, 4):
            assert results[size][i] == results[1][i], (case, size)
    assert len({row[0] for rows, _ in results[1] for row in rows}) > steps  # they learn


@pytest.mark.parametrize(
    ("near", "case"),
    [
        (2, [2, "precision=bf16", "optimizer=muon"]),
        (1, [0, "engine.tensor_parallel=2"]),
        (1, [1, "engine.tensor_parallel=2", "optimizer=muon"]),
        (1, [3, "engine.tensor_parallel=2", "precision=bf16"]),
    ],
)
def test_more_groups_that_divide_a_model_make_the_same_steps(near, case):
    one, two = (
        ranks.run("invariant_scenarios:divided", size, cases=[case], near=near) for size in (2, 4)
    )
    assert one[0][0] == two[0][0]
    assert one == two


def test_a_killed_run_ends_the_same_on_another_number_of_ranks(dataset, tmp_path):
    command = [f"data.path={dataset}", "train.tokens=null", "train.steps=12", "engine=zero2"]
    command += ["checkpoint.every=5", "validation.every=12", "train.invariant=true"]
    command += ["train.global_batch=14", "model.dropout=0.1", "train.compile=on"]
    launching.train(tmp_path, *command, "run.name=whole", "launch.processes=2")
    process = launching.start(tmp_path, *command, "run.name=cut", "launch.processes=3")
    launching.interrupt(process, tmp_path / "cut", 7, 9)
    output = launching.train(tmp_path, *command, "run.name=cut", "launch.processes=1")
    assert "Not bit-exact" not in output
    whole, cut = (launching.trajectory(tmp_path / name) for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_a_run_takes_the_cores_that_there_are_and_makes_the_same_bits(dataset, tmp_path):
    command = [f"data.path={dataset}", "train.tokens=null", "train.steps=40", "engine=zero2"]
    command += ["checkpoint.every=3", "validation.every=40", "train.invariant=true"]
    launching.train(tmp_path, *command, "run.name=whole", "launch.processes=1")
    command += ["run.name=cut", "launch.processes=1-4"]
    cut, cores = tmp_path / "cut", sorted(os.sched_getaffinity(0))

    def stopped(attempt, number):
        """Stop the command five steps after the attempt began."""
        process = launching.start(tmp_path, *command, cold=True)
        steps = lambda: [r for r in launching.rows(cut) if r["attempt"] == attempt]  # noqa: E731
        launching.wait_until(process, lambda: len(steps()) >= 5, f"attempt {attempt}")
        process.send_signal(number)
        process.communicate(timeout=120)

    try:
        os.sched_setaffinity(0, cores[:2])
        stopped(1, signal.SIGKILL)
        os.sched_setaffinity(0, cores[:1])
        stopped(2, signal.SIGTERM)
        os.sched_setaffinity(0, cores[:2])
        assert "Not bit-exact" not in launching.train(tmp_path, *command, cold=True)
    finally:
        os.sched_setaffinity(0, cores)
    files = sorted(cut.glob("attempts/*/launch.json"))
    assert [json.loads(file.read_text())["processes"] for file in files] == [2, 1, 2]
    assert {row["attempt"] for row in launching.rows(cut)} >= {2, 3}
    assert launching.trajectory(cut) == launching.trajectory(tmp_path / "whole")
