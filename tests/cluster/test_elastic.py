"""A job whose number of nodes changes trains the same: with train.invariant every row is that of a
run on two nodes that nothing happened to.

FORESCALE_CLUSTER=all has 4, 2, 3, 1 and 4 nodes; without it one fewer, and one more.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from forescale.run.rows import read_rows
from tests.cluster.lab import Lab
from tests.cluster.submitted import ALL, Fault, Job, tell

# More nodes are faster, though they share the cores of this machine. Fewer last for RESENT seconds.
PACE = """\
import os, time

class Pace:
    def see(self, step, summary):
        time.sleep(0.8 * (4 - int(os.environ["WORLD_SIZE"])))
"""
STEPS = 500 if ALL else 200
KEYS = {
    "train.invariant": "true",
    "train.steps": str(STEPS),
    "train.global_batch": "12",
}
ELASTIC = {
    "slurm.nodes": "1-4",
    "slurm.grow": "5 s",
    "plan.restart": "2 s",
    "callbacks": "[{_target_: pace.Pace}]",
}
# SLURM tells a node that didn't answer again after 60 s (its RPC_RETRY_INTERVAL) to end the step
# that was lost there. A job that has been requeued by then has another step of the same number.
RESENT = 65
OF_THE_CLOCK = {"attempt", "seconds", "tokens_per_second", "mfu", "memory_bytes"}


@pytest.fixture
def job(lab: Lab, tmp_path: Path, dataset: Path) -> Job:
    (tmp_path / "pace.py").write_text(PACE)
    return Job(lab, tmp_path / "runs", "elastic", dataset, KEYS | ELASTIC).submit()


def rows_of(job: Job) -> list[dict[str, Any]]:
    rows = read_rows(job.run.metrics, kind="train")
    return [{k: v for k, v in row.items() if k not in OF_THE_CLOCK} for row in rows]


def check(job: Job, sizes: list[int]) -> None:
    """It ended well, on so many nodes one after the other, and all rows are those of another run
    bit for bit."""
    assert job.until_over() == "COMPLETED", job.logs()
    nodes = [len(life["slurm"]["nodes"]) for life in job.lives()]
    assert [n for n, before in zip(nodes, [0, *nodes], strict=False) if n != before] == sizes
    twin = Job(job.lab, job.root, "twin", job.dataset, KEYS).submit()
    assert twin.until_over() == "COMPLETED", twin.logs()
    assert len(rows_of(twin)) == STEPS
    assert rows_of(job) == rows_of(twin)
    assert not job.lab.run("squeue", "-h").strip()


def changes_to(job: Job, size: int, name: str, act: Any) -> None:
    """After `act` the run goes on on so many nodes."""
    job.until(lambda: job.trained_in_newest > 25)
    fault = Fault(job, name)
    act()
    job.until(lambda: len(job.lives()[-1]["slurm"]["nodes"]) == size and job.trained_in_newest > 1)
    tell(fault.again())


def power_off(lab: Lab, *nodes: str) -> None:
    for node in nodes:
        lab.power_off(node)


def test_a_node_goes_and_comes_back(lab, job):
    changes_to(job, 3, "node powered off, `slurm.nodes=1-4`", lambda: lab.power_off("n2"))
    time.sleep(RESENT)
    assert lab.show(job.id)["Restarts"] == "0", "the job never went back to the queue"
    grown = "a node more is free, `slurm.grow='5 s'`"
    changes_to(job, 4, grown, lambda: lab.power_on("n2"))  # not before: the job may grow at once
    check(job, [4, 3, 4])


@pytest.mark.skipif(not ALL, reason="one of those that FORESCALE_CLUSTER=all adds")
def test_four_two_three_one_and_four_nodes(lab, job):
    def cut_and_power_off() -> None:
        lab.cut("n3")
        lab.power_off("n4")

    def preempt() -> None:
        words = ["-p", "high", "-w", "n1,n4", "-N2", "--exclusive", "--wrap", "sleep 900"]
        high.append(lab.run("sbatch", "--parsable", *words, cwd=job.root).strip())

    def free_all() -> None:
        lab.run("scancel", *high)
        lab.rejoin("n3")

    high: list[str] = []
    changes_to(job, 2, "a node cut off, another powered off, `slurm.nodes=1-4`", cut_and_power_off)
    time.sleep(RESENT)
    changes_to(job, 3, "a node more is free", lambda: lab.power_on("n4"))
    changes_to(job, 1, "preempted, one node is left", preempt)
    changes_to(job, 4, "all nodes are free again", free_all)
    check(job, [4, 2, 3, 1, 4])
