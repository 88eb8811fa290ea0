"""`forescale submit shards`: its script, and the task that goes on after a time limit."""

import json
import subprocess
import sys

from forescale.cli import main

WORDS = ("submit", "shards", "a.txt", "output=out")
# Ends by the signal as a build does. The signal comes while the task is still starting it.
TASK = """
import subprocess, sys, time
from forescale.slurm import command_task
class Slow(subprocess.Popen):
    def __init__(self, *words, **keys):
        super().__init__(*words, **keys)
        time.sleep(0.3)
subprocess.Popen = Slow
build = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit({code}))"
build += "; print('builds', flush=True); time.sleep(60)"
sys.exit(command_task._run([sys.executable, "-c", build]))
"""


def test_an_array_has_a_task_for_each_process_and_ends_before_its_limit(
    tmp_path, monkeypatch, capsys, commands
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a text\n" * 99)
    keys = ("slurm.array=5", "slurm.at_once=2", "slurm.time=1 h")
    assert main([*WORDS, *keys, "--dry-run"]) == 0
    script = capsys.readouterr().out
    for option in ("--array=0-4%2", "--signal=B:USR1@30", "--open-mode=append", "--nodes=1"):
        assert f"#SBATCH {option} " in script or f"#SBATCH {option}\n" in script
    assert main([*WORDS, "slurm.time=30 s"]) == 2
    assert "not longer than the 30 s in which processes end" in capsys.readouterr().err
    assert main(["submit", "train", "x", "experiment=quick", "slurm.array=5", "--dry-run"]) == 2
    assert "slurm.array: is for submit shards" in capsys.readouterr().err

    commands(scontrol="echo MaxArraySize = 3; echo ClusterName = lab", sbatch="echo 40")
    assert main([*WORDS, *keys]) == 0
    out = capsys.readouterr().out
    assert "allows 3 tasks of an array (MaxArraySize), not 5" in out
    assert "Submitted job 40: " in out
    assert "on 3 tasks, each on a node" in out


def test_a_build_that_can_go_on_is_requeued_near_its_time_limit(tmp_path, monkeypatch, commands):
    monkeypatch.setenv("FORESCALE_NODE", str(tmp_path / "node"))
    monkeypatch.setenv("SLURM_JOB_ID", "40")
    # As SLURM does, it ends this start of the job.
    commands(scontrol=f'echo "$@" >> {tmp_path}/calls; [ $1 = requeue ] && kill -TERM $PPID; true')
    for code, requeued in ((75, True), (2, False)):
        task = TASK.replace("{code}", json.dumps(code))
        process = subprocess.Popen([sys.executable, "-c", task], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "builds\n"
        process.send_signal(10)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == code
        assert ("requeued to go on" in out) == requeued
    assert (tmp_path / "calls").read_text() == "requeue 40\n"
