"""The cluster that the tests of this folder run on does what it says."""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forescale.slurm.config import SlurmConfig
from forescale.slurm.steps import srun
from tests.cluster.lab import Lab

TEMPLATE = Path(__file__).parents[2] / "slurm/job.sbatch.j2"

HOLDER = """
import sys, time
from pathlib import Path
from tests.cluster.lab import Lab
lab = Lab(Path(sys.argv[1]), nodes=1)
lab.start()
print(lab._machines["n1"].pid, flush=True)
time.sleep(100)
"""


def submit(lab: Lab, *options: str, script: str) -> str:
    text = "#!/bin/bash\n" + script
    return lab.run("sbatch", "--parsable", "-o", "/dev/null", *options, input=text).strip()


def of_root(root: Path) -> list[str]:
    """Processes of this machine that have to do with the cluster in `root`."""
    listed = subprocess.run(["ps", "axo", "pid,args"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if str(root) in line]


def test_a_job_of_two_nodes_has_two_addresses(lab, tmp_path):
    out = tmp_path / "out"
    script = "srun sh -c 'hostname; hostname -I; echo $HOME'"
    job = submit(lab, "-N2", "-o", str(out), "-J", "two words", script=script)
    lab.wait(lambda: lab.state(job) == "COMPLETED", 30)
    lines = out.read_text().split()
    assert sorted(lines) == sorted([*("n1", "10.77.0.1"), *("n2", "10.77.0.2"), *("/root",) * 2])
    assert lab.show(job)["JobName"] == "two words"
    assert lab.state(999999) == ""


def test_a_node_without_power_loses_its_job_to_another_and_one_cut_off_comes_back(lab):
    mine = lab.scratch / "mine"
    job = submit(lab, "--requeue", script=f"touch {mine}; sleep 60")
    lab.wait(lambda: lab.pids("n1", "sleep 60"), 20)
    assert lab.files("n1", mine).exists()
    assert not lab.files("n2", mine).exists()
    lab.power_off("n1")
    lab.cut("n4")
    assert lab.pids("n1", "") == []
    lab.wait(lambda: lab.show(job)["Restarts"] == "1", 40)
    lab.power_on("n1")
    assert not lab.files("n1", mine).exists()
    lab.wait(lambda: "DOWN" in lab.node_state("n4"), 20)
    lab.rejoin("n4")
    lab.wait(lambda: lab.node_state("n1") in ("IDLE", "MIXED"), 20)
    assert sorted(lab.run("srun", "-w", "n1,n4", "hostname").split()) == ["n1", "n4"]
    assert lab.wait(lambda: lab.state(job) == "RUNNING", 20)


def test_reset_ends_what_ignores_signals(lab):
    job = submit(lab, "-N4", script="trap '' TERM; srun sh -c \"trap '' TERM; sleep 100\"")
    lab.wait(lambda: lab.pids("n4", "sleep 100"), 20)
    lab.down("n3")
    lab.power_off("n2")
    lab.reset()
    assert lab.run("sinfo", "-h", "-o", "%P %D %T") == "low* 4 idle\nhigh 4 idle\n"
    assert lab.run("squeue", "-h") == ""
    assert not any(lab.pids(node, "sleep") for node in lab.nodes)
    assert int(submit(lab, script="true")) > int(job)


def test_nothing_is_left_of_a_cluster_that_stopped(can_start):
    with tempfile.TemporaryDirectory(prefix="fs", dir="/tmp") as folder:
        root = Path(folder)
        with Lab(root, nodes=1, gpus=2, memory_of={"n1": 2000}) as lab:
            assert lab.run("srun", "--gres=gpu:2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES") == (
                "0,1\n"
            )
            assert "RealMemory=2000 " in lab.run("scontrol", "-o", "show", "node", "n1")
            settings = SlurmConfig(gpus_per_task=1, tasks_per_node=2)
            unset = re.search("^unset SLURM_GPUS.*", TEMPLATE.read_text(), re.MULTILINE)[0]
            for tasks in (1, 2):  # the preflight's step, and the ranks'
                show = [*srun(settings, tasks), "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
                asks = ["salloc", "-QN1", "--ntasks-per-node=2", "--gpus-per-task=1", "bash", "-c"]
                assert lab.run(*asks, f"{unset}; {shlex.join(show)}") == "0,1\n" * tasks
            assert of_root(root)
        assert not of_root(root)
        assert folder not in Path("/proc/mounts").read_text()


def test_a_cluster_dies_with_the_process_that_started_it(can_start):
    with tempfile.TemporaryDirectory(prefix="fs", dir="/tmp") as folder:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, folder],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        pid = holder.stdout.readline().strip()
        assert pid
        assert Path(f"/proc/{pid}").exists()
        holder.kill()
        holder.wait()
        holder.stdout.close()
        deadline = time.monotonic() + 10
        while of_root(Path(folder)):
            assert time.monotonic() < deadline, of_root(Path(folder))
            time.sleep(0.05)
