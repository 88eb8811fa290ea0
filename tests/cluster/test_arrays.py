"""Many runs as one array: what happens to one task is its own affair; and requeues that bring
nothing come to an end."""

import json
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.cluster.submitted import ALL, Fault, Job, tell


@pytest.fixture
def job(lab: Lab, tmp_path: Path, dataset: Path) -> Job:
    return Job(lab, tmp_path / "runs", "r0", dataset)


def submit_array(job: Job, count: int, **keys: str) -> list[Job]:
    """Return the runs r0, r1, ... of one array, a node each; all train the same."""
    job.root.parent.mkdir(exist_ok=True)
    (job.root.parent / "sweep.txt").write_text("".join(f"r{i}\n" for i in range(count)))
    job.submit(**{"slurm.runs": "sweep.txt", "slurm.nodes": "1", **keys})
    array = job.id.partition("_")[0]
    jobs = [Job(job.lab, job.root, f"r{i}", job.dataset, job.keys) for i in range(count)]
    for i, one in enumerate(jobs):
        one.id = json.loads((one.run.jobs()[0] / "job.json").read_text())["id"]
        assert one.id == f"{array}_{i}"
    return jobs


@pytest.mark.parametrize(
    "limit",
    ["signal", pytest.param("limit", marks=pytest.mark.skipif(not ALL, reason="minutes more"))],
)
def test_one_task_of_an_array_is_requeued_alone(job, lab, limit):
    """A command about the number of an array is one about all its tasks."""
    slow = ",".join(f"slow@{step}:rank0" for step in range(1, 200, 10))
    jobs = submit_array(job, 4, **{"train.steps": "200", "faults": f"[{slow}]"})
    for one in jobs:
        one.until_step(10)
    second = jobs[1]
    if limit == "limit":
        fault = Fault(second, "time limit of one task of an array")
        lab.run("scontrol", "update", f"jobid={second.id}", "TimeLimit=1")
        second.until(lambda: "SIGUSR1: ranks save" in second.log)
        fault.began = fault.signalled  # SLURM looks at limits only now and then
    else:
        fault = Fault(second, "one task of an array asked to end (`scancel --signal=USR1`)")
        lab.run("scancel", "--batch", "--signal=USR1", second.id)
    second.until(lambda: lab.show(second.id).get("Restarts") == "1")
    if limit == "limit":
        lab.run("scontrol", "update", f"jobid={second.id}", "TimeLimit=20")
    fault.again()
    for one in jobs:
        assert one.until_over() == "COMPLETED", one.logs()
    assert [len(one.lives()) for one in jobs] == [1, 2, 1, 1]
    assert [one.lives()[0]["slurm"]["job"] for one in jobs] == [one.id for one in jobs]
    assert [life["code"] for life in second.lives()] == [75, 0]
    assert second.losses() == jobs[0].losses()
    assert all("Done." in one.log for one in jobs), "each log lies with its own run"
    tell(fault)


def test_requeues_that_bring_no_checkpoint_come_to_an_end(job, lab):
    """Here each start is asked to end before its first step, as by a limit that is too short."""
    job.submit(**{"slurm.max_requeues": "1"})
    for life in (1, 2):
        job.until(lambda life=life: len(job.lives()) == life)
        lab.run("scancel", "--batch", "--signal=USR1", job.id)
    assert job.until_over() == "FAILED", job.logs()
    assert lab.show(job.id)["ExitCode"] == "76:0"
    assert "Gave up after 2 starts of the job in a row without a new checkpoint" in job.log
    assert job.step == 0
