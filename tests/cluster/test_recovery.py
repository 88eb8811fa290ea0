"""Whatever happens to a job on a cluster, its losses are those of a run that nothing happened to.

FORESCALE_CLUSTER=all runs all faults; without it six of them.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.cluster.submitted import ALL, Fault, Job, tell

rare = pytest.mark.skipif(not ALL, reason="one of the faults that FORESCALE_CLUSTER=all adds")
# Steps, and times that a run meets its time limit.
LONGEST, LIMITS = (600, 3) if ALL else (500, 1)
RANK = "forescale.slurm.rank"  # in the command line of a rank


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cluster") / "runs"


@pytest.fixture(scope="session")
def reference(lab: Lab, runs: Path, dataset: Path) -> dict[int, float]:
    """The losses of a run on two nodes that nothing happened to."""
    job = Job(lab, runs, "reference", dataset, {"train.steps": str(LONGEST)}).submit()
    assert job.until_over() == "COMPLETED", job.logs()
    assert len(job.losses()) == LONGEST
    return job.losses()


@pytest.fixture
def job(lab: Lab, runs: Path, dataset: Path, request) -> Job:
    return Job(lab, runs, request.node.name.removeprefix("test_"), dataset)


def check(job: Job, reference: dict[int, float], fault: Fault, steps: int = 150) -> None:
    """It ended well, and every loss is the reference's, bit for bit."""
    assert job.until_over() == "COMPLETED", job.logs()
    losses = job.losses()
    assert len(losses) == steps
    assert losses == {step: reference[step] for step in losses}
    tell(fault)


def test_the_time_limit_again_and_again(lab, job, reference):
    # SLURM looks at limits every 30 s: a step takes 0.1 s more, so that there is something to end.
    slow = ",".join(f"slow@{step}:rank0" for step in range(1, LONGEST, 20))
    job.submit(**{"train.steps": str(LONGEST), "slurm.lead": "30 s", "faults": f"[{slow}]"})
    faults = []
    for life in range(1, LIMITS + 1):
        job.until(lambda life=life: len(job.lives()) == life and job.trained_in_newest > 20)
        fault = Fault(job, f"time limit ({life})")
        lab.run("scontrol", "update", f"jobid={job.id}", "TimeLimit=1")
        job.until(lambda life=life: lab.show(job.id).get("Restarts") == str(life))
        lab.run("scontrol", "update", f"jobid={job.id}", "TimeLimit=20")
        fault.began = fault.signalled  # SLURM looks at limits only now and then
        faults.append(fault.again())
    assert all(fault.lost == 0 for fault in faults)
    for fault in faults[:-1]:
        tell(fault)
    check(job, reference, faults[-1], LONGEST)
    assert [life["code"] for life in job.lives()] == [75] * LIMITS + [0]


def test_preempted_by_a_higher_partition(lab, job, reference):
    job.submit().until_step(45)
    fault = Fault(job, "preempted")
    lab.run("sbatch", "-p", "high", "-N4", "--exclusive", "--wrap", "sleep 3", cwd=job.root)
    fault.again()
    assert fault.lost == 0
    check(job, reference, fault)
    status = job.forescale("status", job.name)
    assert "queue " in re.search(r"^Time .*", status, re.MULTILINE)[0], status


@rare
def test_requeued_by_hand_in_mid_step(lab, job, reference):
    job.submit().until_step(45)
    fault = Fault(job, "scontrol requeue")
    lab.run("scontrol", "requeue", job.id)
    fault.again()
    assert fault.lost == 0
    check(job, reference, fault)


def test_a_rank_is_killed(lab, job, reference):
    # A busy template may report the death late; until then, ranks that wait aren't a hang.
    job.submit(**{"heartbeat.patience": "30 s"}).until_step(45)
    fault = Fault(job, "rank killed (SIGKILL)")
    pid = lab.pids("n2", RANK)[-1]  # the first is its template
    os.kill(pid, signal.SIGKILL)
    fault.again()
    assert "rank 1 ended with SIGKILL" in job.lives()[0]["how"]
    assert job.lives()[0]["blamed"].keys() == {"n2"}
    assert len({life["slurm"]["restart"] for life in job.lives()}) == 1, "in the same allocation"
    assert not (job.attempts()[1].path / "preflight.json").exists(), "by the tasks of the same step"
    check(job, reference, fault)


@rare
def test_ranks_are_killed_while_others_start_again(lab, job, reference):
    job.submit().until_step(45)
    fault = Fault(job, "rank killed, and another one in its recovery")
    os.kill(lab.pids("n1", RANK)[-1], signal.SIGKILL)
    job.until(lambda: len(job.attempts()) == 2 and len(lab.pids("n2", RANK)) == 2)
    os.kill(lab.pids("n2", RANK)[-1], signal.SIGKILL)
    job.until(lambda: len(job.attempts()) == 3)
    fault.again()
    assert [len(life["blamed"]) for life in job.lives()[:2]] == [1, 1]
    check(job, reference, fault)


@rare
def test_a_template_of_ranks_is_killed(lab, job, reference):
    job.submit().until_step(45)
    fault = Fault(job, "template of a rank killed")
    os.kill(lab.pids("n2", RANK)[0], signal.SIGKILL)
    fault.again()
    assert (job.attempts()[1].path / "preflight.json").exists(), "a cold start"
    check(job, reference, fault)


@rare
def test_a_node_that_is_to_blame_twice_is_left_out(lab, job, reference):
    job.submit()
    for life in range(1, 3):
        job.until(lambda life=life: len(job.lives()) == life and job.trained_in_newest > 25)
        fault = Fault(job, "rank of one node killed twice")
        pid = lab.pids("n2", RANK)[-1]  # the first is its template
        os.kill(pid, signal.SIGKILL)
        job.until(lambda fault=fault: job.attempts()[-1].number > fault.attempt.number)
    fault.again()
    assert [life["slurm"]["restart"] for life in job.lives()] == [0, 0, 1]
    assert "n2" not in job.lives()[-1]["slurm"]["nodes"]
    assert "n2 (rank 1 ended with SIGKILL" in job.log
    check(job, reference, fault)


def test_srun_is_killed_and_then_the_supervisor(lab, job, reference):
    """Neither can say so. The ranks of the one would train on, and the job of the other end."""
    job.submit().until_step(45)
    fault = Fault(job, "srun killed (SIGKILL)")
    for pid in reversed(lab.pids("n1", "srun --export")):  # first the child that would end the step
        os.kill(pid, signal.SIGKILL)
    fault.again(60)
    assert job.attempts()[-1].parent.step < 150, "its ranks didn't train on to the end"
    tell(fault)
    fault = Fault(job, "supervisor killed (SIGKILL)")
    (pid,) = lab.pids("n1", "-m forescale.slurm.batch")
    os.kill(pid, signal.SIGKILL)
    fault.again()
    assert [life["slurm"]["restart"] for life in job.lives()] == [0, 0, 1]
    assert job.lives()[0]["blamed"] == {}
    check(job, reference, fault)


@rare
def test_slurmd_is_killed(lab, job, reference):
    job.submit().until_step(45)
    fault = Fault(job, "slurmd killed")
    lab.kill_slurmd("n2")
    time.sleep(3)
    lab.start_slurmd("n2")
    fault.trains = fault.began  # steps go on
    check(job, reference, fault)
    assert len(job.lives()) == 1


def test_a_node_loses_its_power(lab, job, reference):
    job.submit().until_step(45)
    fault = Fault(job, "node powered off")
    lab.power_off("n2")
    fault.again()
    assert "n2" not in job.lives()[-1]["slurm"]["nodes"]
    check(job, reference, fault)


@rare
def test_a_spare_node_replaces_one_that_loses_its_power(lab, job, reference):
    """What was in the memory of that node is in that of the other one, too."""
    keys = {"slurm.spares": "1", "checkpoint.peer": "10 steps", "checkpoint.every": "1000 steps"}
    job.submit(**keys).until_step(45)
    fault = Fault(job, "node powered off, with a spare one and `checkpoint.peer`")
    lab.power_off("n2")
    fault.again()
    assert job.attempts()[-1].parent.step >= 30, job.logs()
    (used,) = job.run.read_events(kind="snapshot_used")
    assert (used["nodes"], used["stored"]) == (1, 0)
    assert "Node n3 takes the place of n2" in job.log
    check(job, reference, fault)
    assert [life["slurm"]["nodes"] for life in job.lives()] == [["n1", "n2"], ["n1", "n3"]]
    assert lab.show(job.id)["Restarts"] == "0", "the job never went back to the queue"


@rare
def test_the_first_node_loses_its_power_and_spare_ones_cannot_help(lab, job, reference):
    """The batch script is gone with it, and SLURM leaves such a job without one. Lost with it is
    one of two nodes that look whether it is there."""
    job.submit(**{"slurm.spares": "1"}).until_step(45)
    fault = Fault(job, "first node powered off with another, one of them spare")
    lab.power_off("n1")
    lab.power_off("n2")
    job.until(lambda: lab.show(job.id)["Restarts"] == "1")
    lab.power_on("n2")
    fault.again()
    assert lab.show(job.id)["Restarts"] == "1"
    assert job.lives()[-1]["slurm"]["nodes"] == ["n2", "n3"]
    check(job, reference, fault)


def test_a_node_is_cut_off_and_comes_back(lab, job, reference):
    """The first node: with the batch script, and with rank 0, which writes rows and checkpoints.
    They are alive all the time, in the same file system."""
    job.submit(**{"train.steps": "400"}).until_step(45)
    fault = Fault(job, "network of the first node cut")
    lab.cut("n1")
    fault.again()
    alive = lab.pids("n1", "forescale.slurm.batch")
    assert alive, "the old batch script should still be there"
    lab.rejoin("n1")
    check(job, reference, fault, 400)
    lives = job.lives()
    assert "n1" in lives[0]["slurm"]["nodes"]
    assert all("n1" not in life["slurm"]["nodes"] for life in lives if life["slurm"]["restart"])
    hang = (fault.attempt.path / "hang.json").stat().st_mtime - fault.began
    assert hang < 10, hang


@rare
def test_a_rank_that_stands_still_is_named_across_nodes(lab, job, reference):
    job.submit().until_step(45)
    fault = Fault(job, "rank stopped (SIGSTOP)")
    pid = lab.pids("n2", RANK)[-1]  # the first is its template
    os.kill(pid, signal.SIGSTOP)
    fault.again()
    assert "rank 1 on host n2 has not answered" in job.lives()[0]["how"]
    assert job.lives()[0]["blamed"].keys() == {"n2"}
    assert fault.noticed < 12
    check(job, reference, fault)
