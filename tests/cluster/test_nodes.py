"""What is wrong with a node is said in the first seconds, by its name, before any rank starts."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from forescale.config.schema import plain
from forescale.run.directory import Run
from forescale.slurm import steps
from forescale.slurm.config import SlurmConfig
from forescale.slurm.submission import Submission
from tests.cluster.lab import Lab
from tests.cluster.submitted import ALL, Job

rare = pytest.mark.skipif(not ALL, reason="one of those that FORESCALE_CLUSTER=all adds")
CGROUP = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def job(lab: Lab, tmp_path: Path, dataset: Path) -> Job:
    return Job(lab, tmp_path / "runs", "small", dataset, {"train.steps": "12"})


@pytest.fixture
def small_memory():
    """Put processes under a limit of the kernel's: small_memory(pids, bytes)."""
    if not (CGROUP / "cgroup.procs").exists():
        pytest.skip("the kernel's memory controller (cgroup v1) is not mounted here")
    group = CGROUP / f"forescale-{os.getpid()}"
    group.mkdir()

    def limit(pids: list[int], size: int) -> None:
        (group / "memory.limit_in_bytes").write_text(str(size))
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))

    yield limit
    for pid in (group / "cgroup.procs").read_text().split():
        (CGROUP / "cgroup.procs").write_text(pid)
    group.rmdir()


def left_out(job: Job, *nodes: str) -> dict[str, str]:
    """The run ended well without these nodes; why they were left out."""
    assert job.until_over() == "COMPLETED", job.logs()
    first, last = job.lives()
    assert {*nodes} <= {*first["slurm"]["nodes"]}
    assert {*nodes}.isdisjoint(last["slurm"]["nodes"])
    assert first["faulty"].keys() == {*nodes}
    assert not (job.attempts()[0].path / "node-0.log").exists(), "no rank was started"
    return first["faulty"]


def test_a_node_with_too_little_memory(job, lab, small_memory):
    small_memory(lab.pids("n2", "slurmd"), 600 << 20)
    assert "of memory" in left_out(job.submit(), "n2")["n2"]


def test_a_node_without_the_data_and_one_whose_clock_is_wrong(job, lab):
    """The data is on each node's own disk, but for n1. The clock is a named fake: all nodes of the
    lab share one clock."""
    here = lab.scratch / "data"
    shutil.copytree(job.dataset, here)  # the login node's
    clock = "{FORESCALE_FAKE_CLOCK: '90', FORESCALE_FAKE_CLOCK_NODE: n2}"
    try:
        for node in ("n2", "n3", "n4"):
            lab.on(node, "cp", "-r", job.dataset, here)
        job.submit(**{"data.path": str(here), "slurm.exports": clock})
        why = left_out(job, "n1", "n2")
    finally:
        shutil.rmtree(here)
    assert f"{here}" in why["n1"]
    assert "its clock is 90.0 s ahead of the first node's" in why["n2"]


def test_a_node_with_a_slow_network(job, lab):
    lab.slow("n3", "400mbit")
    keys = {"slurm.nodes": "3", "train.global_batch": "6", "slurm.allreduce": "true"}
    assert "GB/s at best with its neighbours" in left_out(job.submit(**keys), "n3")["n3"]


def test_what_all_nodes_lack_is_the_users_and_ends_the_job(job, lab):
    copied = job.root.parent / "copy"
    shutil.copytree(job.dataset, copied)
    lab.run("scontrol", "update", "partitionname=low", "state=down")  # it waits
    job.submit(**{"data.path": str(copied)})
    shutil.rmtree(copied)
    lab.run("scontrol", "update", "partitionname=low", "state=up")
    assert job.until_over() == "FAILED"
    assert lab.show(job.id)["ExitCode"] == "2:0"
    assert "all nodes: " in job.log
    assert re.search(r"small +refused(.|\n)*: It was refused: all nodes", job.forescale("status"))
    assert len(job.lives()) == 1


@rare
def test_a_full_disk_of_the_run_is_a_sentence_and_it_goes_on_when_there_is_room(job, lab):
    """The same disk holds the log of the batch script and what it records."""
    job.root.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "none", job.root], check=True)
    try:
        lab.reset()  # machines see what was mounted before they start
        keys = {"train.steps": "400", "checkpoint.every": "20 steps"}
        job.submit(**keys).until_step(45)
        ballast = job.root / "ballast"
        subprocess.run(["sh", "-c", f"cat /dev/zero > {ballast}"], stderr=subprocess.DEVNULL)
        assert job.until_over() == "FAILED", job.logs()
        assert lab.show(job.id)["ExitCode"] == "2:0", job.logs()
        assert "the disk is full" in job.lives()[-1]["how"]
        assert "Traceback" not in job.log
        assert re.search(r"small +(refused|crashed|interrupted)", job.forescale("status"))
        ballast.unlink()
        job.submit(**keys)
        assert job.until_over() == "COMPLETED", job.logs()
        assert job.step == 400
    finally:
        lab.stop()
        subprocess.run(["umount", "-l", job.root], check=True)
        lab.start()


def test_nodes_get_a_packed_environment_from_each_other(lab, tmp_path, monkeypatch):
    """As more than 16 nodes do: SLURM's own sbcast writes to the disk of each."""
    scratch = lab.scratch / "own"
    monkeypatch.setattr(steps, "MANY_NODES", 2)
    monkeypatch.setenv("FORESCALE_SCRATCH", str(scratch))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\necho Python of $SLURMD_NODENAME\n" + "#" * (20 << 20))
    python.chmod(0o755)
    tar = tmp_path / "venv-7.tar"
    subprocess.run(["tar", "-cf", tar, "-C", tmp_path / "venv", "."], check=True)
    job = Submission(Run(tmp_path / "runs/first").new_job())
    subprocess.run(["tar", "-cf", job.code, "-T", "/dev/null"], check=True)
    job.write(slurm=plain(SlurmConfig()), data=[], environment=str(tar))
    nodes = ["n1", "n2", "n3"]
    command = shlex.join(steps.nodes(Submission(job.path), nodes[:2], nodes))
    script, output = tmp_path / "script.sh", tmp_path / "output"
    variables = f"export FORESCALE_SCRATCH={scratch} FORESCALE_NODE={scratch}/job-1"
    script.write_text(f"#!/bin/bash\n{variables}\n{command}\n")
    order = ["sbatch", "--wait", "--nodes=3", "--nodelist=n1,n2,n3", "--ntasks-per-node=1"]
    lab.run(*order, f"--output={output}", script)
    text = output.read_text()
    assert {f"Python of {node}" for node in nodes[:2]} <= {*text.splitlines()}
    assert "sbcast failed" not in text
    # The third has a copy, as a spare node: nothing has unpacked it yet.
    copy = lab.files("n3", scratch / "environment-venv-7.1.tar")
    assert copy.read_bytes() == tar.read_bytes()
