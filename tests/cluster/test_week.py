"""A week in the life of a cluster, in minutes: runs and an array in the queue, while faults of all
kinds meet whatever runs at that moment.

Every run ends complete, with the losses of one that nothing happened to; no job is left behind, and
no requeue brings nothing twice. FORESCALE_CLUSTER=all has 20 runs and 24 faults.
"""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.cluster.submitted import ALL, Job
from tests.cluster.test_arrays import submit_array

ALONE, OF_ARRAY, FAULTS = (8, 12, 24) if ALL else (2, 4, 6)
RANK = "forescale.slurm.rank"
STEPS = 120
KEYS = {
    "slurm.nodes": "1",
    "train.steps": str(STEPS),
    # Some steps take longer, so that a run lasts long enough to meet a fault.
    "faults": "[" + ",".join(f"slow@{step}:rank0" for step in range(5, STEPS, 10)) + "]",
}
pytestmark = pytest.mark.timeout(3600)


class Week:
    """The faults that can happen, each to a job or a node that is chosen by `chance`."""

    def __init__(self, lab: Lab, folder: Path, chance: random.Random):
        self.lab, self.folder, self.chance = lab, folder, chance
        self.faults: list[str] = []

    def happens(self, fault: str, jobs: list[Job]) -> None:
        """To a job that trains; if none does, to the first that will, however busy the machine."""

        def trained() -> list[Job]:
            return [job for job in jobs if self.lab.state(job.id) == "RUNNING" and job.step]

        def is_over() -> bool:
            return all(self.lab.state(job.id) == "COMPLETED" for job in jobs)

        with suppress(AssertionError):
            self.lab.wait(lambda: trained() or is_over(), 120, every=0.5)
        if not (running := trained()):
            return
        job = self.chance.choice(running)
        node = self.lab.show(job.id).get("BatchHost", "")
        with suppress(AssertionError, LookupError, ProcessLookupError, ValueError):  # just over
            getattr(self, fault)(job, node)
            self.faults.append(f"{fault}: {job.name} on {node}, step {job.step}")

    def limit(self, job: Job, node: str) -> None:
        self.lab.run("scancel", "--batch", "--signal=USR1", job.id)

    def requeue(self, job: Job, node: str) -> None:
        self.lab.run("scontrol", "requeue", job.id)

    def preempt(self, job: Job, node: str) -> None:
        words = ["sbatch", "-p", "high", "-w", node, "--exclusive", "--wrap", "sleep 2"]
        self.lab.run(*words, cwd=self.folder)

    def kill(self, job: Job, node: str) -> None:
        # LookupError: no rank is there, between two attempts
        os.kill(self.chance.choice(self.lab.pids(node, RANK)), signal.SIGKILL)

    def slurmd(self, job: Job, node: str) -> None:
        self.lab.kill_slurmd(node)
        time.sleep(1)
        self.lab.start_slurmd(node)

    def power(self, job: Job, node: str) -> None:
        self.lab.power_off(node)
        self.lab.wait(lambda: "DOWN" in self.lab.node_state(node), 60)
        self.lab.power_on(node)

    def down(self, job: Job, node: str) -> None:
        self.lab.down(node)
        time.sleep(1)
        self.lab.resume(node)

    def supervisor(self, job: Job, node: str) -> None:
        os.kill(self.chance.choice(self.lab.pids(node, "forescale.slurm.batch")), signal.SIGKILL)

    def srun(self, job: Job, node: str) -> None:
        for pid in reversed(self.lab.pids(node, "srun --export")):  # of all jobs of the node
            os.kill(pid, signal.SIGKILL)


def test_a_week_of_faults_changes_no_loss(lab, tmp_path, dataset):
    chance = random.Random(7)
    twin = Job(lab, tmp_path / "runs", "twin", dataset, KEYS).submit()
    assert twin.until_over() == "COMPLETED", twin.logs()
    alone = [Job(lab, tmp_path / "runs", f"s{i}", dataset, KEYS).submit() for i in range(ALONE)]
    first = Job(lab, tmp_path / "runs", "r0", dataset, KEYS)
    jobs = [*alone, *submit_array(first, OF_ARRAY)]
    week = Week(lab, tmp_path, chance)
    kinds = [name for name in vars(Week) if name[0] != "_" and name != "happens"]
    for fault in (kinds * FAULTS)[:FAULTS]:
        time.sleep(chance.uniform(2, 6))
        week.happens(fault, jobs)
    output = "\n".join(week.faults)
    assert len(week.faults) >= FAULTS // 2, output
    for job in jobs:
        assert job.until_over(600) == "COMPLETED", f"{output}\n{job.logs()}"
        assert job.losses() == twin.losses(), f"{output}\n{job.logs()}"
        assert "Gave up" not in job.log
    assert not lab.run("squeue", "-h").strip()
    for node in lab.nodes:
        assert not lab.pids(node, "forescale"), output
