"""The batch script: what sbatch and bash will read, for each key of the profile."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from forescale.config.duration import Duration
from forescale.config.sizes import Sizes
from forescale.ground.errors import UserError
from forescale.slurm.config import SlurmConfig
from forescale.slurm.script import Order
from forescale.slurm.steps import srun
from forescale.slurm.submission import Submission


def order(settings=None, names=("first",), root="/runs", lead=70, **facts):
    paths = [Path(root) / name for name in names]
    folders = [Submission(path / "jobs/0001") for path in paths]
    return Order(names, paths, folders, replace(settings or SlurmConfig(), **facts), lead, "plain")


def lines(script):
    """sbatch's options, without the comments beside them."""
    options = (x for x in script.splitlines() if x.startswith("#SBATCH "))
    return [x.removeprefix("#SBATCH ").partition("  #")[0] for x in options]


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("partition", "gpu", "--partition=gpu"),
        ("account", "us", "--account=us"),
        ("qos", "high", "--qos=high"),
        ("constraint", "h100&ib", "--constraint='h100&ib'"),
        ("reservation", "r", "--reservation=r"),
        ("mem", "64G", "--mem=64G"),
        ("nodes", Sizes(8, 8), "--nodes=8"),
        ("nodes", Sizes(2, 8), "--nodes=2-8"),
        ("spares", 2, "--nodes=3"),
        ("gpus_per_node", 4, "--gpus-per-node=4"),
        ("gpus_per_node", 4, "--ntasks-per-node=4"),
        ("gres", "gpu:a100:2", "--gres=gpu:a100:2"),
        ("cpus_per_task", 7, "--cpus-per-task=7"),
        ("time", Duration(90000, "seconds"), "--time=1-01:00:00"),
        ("time", Duration(90000, "seconds"), "--signal=B:USR1@70"),
        ("exclusive", True, "--exclusive"),
        ("exclude", ["a", "b"], "--exclude=a,b"),
        ("after", ["12", "13_4"], "--dependency=afterok:12:13_4"),
        ("requeue", True, "--requeue"),
        ("requeue", False, "--no-requeue"),
        ("options", ["--mail-type=ALL"], "--mail-type=ALL"),
        ("options", ["--comment=hi there"], "--comment='hi there'"),
        ("options", ["--comment='hi there'"], "--comment='hi there'"),
        ("options", ["-p gpu"], "-p gpu"),
        ("mem_per_gpu", "120G", "--mem-per-gpu=120G"),
        ("gpus_per_task", 1, "--gpus-per-task=1"),
        ("switches", "1@12:00:00", "--switches=1@12:00:00"),
        ("network", "job_vni", "--network=job_vni"),
        ("licenses", "scratch:1", "--licenses=scratch:1"),
        ("nice", -5, "--nice=-5"),
        ("mail", "me@example.org", "--mail-user=me@example.org"),
        ("mail", "me@example.org", "--mail-type=END,FAIL"),
    ],
)
def test_a_key_becomes_an_option(key, value, option):
    assert option in lines(order(**{key: value}).script())


@pytest.mark.parametrize(
    ("nodes", "spares", "goes_on"), [(2, 1, True), (2, 0, False), (1, 1, False)]
)
def test_slurm_ends_no_job_that_can_replace_the_node_it_lost(nodes, spares, goes_on):
    """A run of one node is lost with the batch script that is there."""
    assert (
        "--no-kill" in lines(order(nodes=Sizes(nodes, nodes), spares=spares).script())
    ) == goes_on


def test_a_job_that_inherits_no_module_gets_that_of_a_login_shell(tmp_path):
    """As with --export=NONE; files of /etc/profile.d often end with a command that fails."""
    profile = tmp_path / "profile"
    profile.write_text('module() { echo "$*" >> "$PWD/loaded"; }\nPATH=/usr/bin\nfalse\n')
    script = order(modules=["cuda/12"], setup=["module list", "module $PATH"]).script()
    head = script.partition("set -u")[0].replace("/etc/profile", str(profile))
    subprocess.run(["bash", "-c", head], cwd=tmp_path, check=True, env={"PATH": "/bin"})
    assert (tmp_path / "loaded").read_text() == "load cuda/12\nlist\n/bin:/usr/bin\n"


def test_a_gpu_for_each_task_is_an_option_of_sbatch_alone():
    """A step of one task a node must see the GPUs of all, and so must each rank."""
    settings = SlurmConfig(gpus_per_task=1, tasks_per_node=4)
    assert (settings.problems(), settings.gpus, settings.ranks_per_node) == ([], 4, 4)
    (unset,) = (x for x in order(settings).script().splitlines() if x.startswith("unset SLURM"))
    assert {"SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_TRES_BIND"} < {*unset.split()}
    assert "--gpus-per-node=4" in srun(settings, 1)


def test_no_value_reaches_the_shell_unquoted(tmp_path):
    evil = "x'; touch pwned; '$(touch pwned)"
    array = order(
        names=("first",), root=str(tmp_path / evil), exports={"X": evil}, modules=[evil],
        scratch=str(tmp_path / evil), python="true",
    )  # fmt: skip
    body = array.script().replace("module load", "echo").replace('tar -xf "$job/code.tar"', ": ")
    body = body.replace('mkdir "$FORESCALE_NODE"', ":")
    run = ["bash", "-c", body + "\n"]
    subprocess.run(run, cwd=tmp_path, check=True, env={"SLURM_JOB_ID": "1", "PATH": "/bin"})
    assert not (tmp_path / "pwned").exists()
    assert not Path("pwned").exists()


def test_bash_takes_it_and_ends_in_the_batch_program():
    script = order().script()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert '-P -m forescale.slurm.batch "$run" "$job" &' in script
    assert script.endswith("\nexit $code\n")


NAP = "for i in 1 2 3 4 5; do sleep 0.1; done"
SUPERVISOR = """\
trap 'echo USR1 >> signals; exit 75' USR1
trap 'echo TERM >> signals' TERM
mkdir -p runs/first/attempts/$(date +%N)
"""


@pytest.mark.parametrize(
    ("lines", "state", "code", "requeues"),
    [
        ("exit 2", "RUNNING", 2, 0),
        ("exit 247", "RUNNING", 247, 0),  # a code of its own, of a rank that ended with -9
        ("kill -KILL $$", "RUNNING", 137, 1),
        ("kill -KILL $$", "CANCELLED", 137, 0),
        ("kill -KILL $$", "RUNNING Restarts=1", 137, 0),  # it runs elsewhere by now
        ("touch runs/first/jobs/0001/stop; kill -KILL $$", "RUNNING", 137, 0),
        (f"{NAP}; kill -TERM $PPID; {NAP}; kill -USR1 $PPID; {NAP}; {NAP}", "RUNNING", 75, 0),
    ],
)  # fmt: skip
def test_a_job_whose_supervisor_is_killed_is_requeued(tmp_path, lines, state, code, requeues):
    done, calls = supervised(tmp_path, SUPERVISOR + lines, state)
    assert done.returncode == code, done.stderr
    assert calls.count("requeue 40_0") == requeues
    if code == 75:
        assert (tmp_path / "signals").read_text() == "TERM\nUSR1\n", "of the shell, passed on"


def test_a_supervisor_that_never_gets_to_its_ranks_is_not_requeued_for_ever(tmp_path):
    for number in (1, 2, 3, 4, 5, 5, 5):
        calls = supervised(tmp_path, "kill -SEGV $$", "RUNNING")[1]
        assert calls.count("requeue 40_0") == number
    calls = supervised(tmp_path, f"{SUPERVISOR}kill -SEGV $$", "RUNNING")[1]
    assert calls.count("requeue 40_0") == 6, "one that gets there may be killed again"


def supervised(tmp_path, supervisor, state):
    """Run the script of a task of an array, with a supervisor of these lines. scontrol says this
    state of the job. Return how the script ended, and all calls of scontrol."""
    array = order(root=str(tmp_path / "runs"), scratch=str(tmp_path / "scratch"), python="python")
    (tmp_path / "runs/first/jobs/0001").mkdir(parents=True, exist_ok=True)
    (tmp_path / "bin").mkdir(exist_ok=True)
    restarts = "" if "Restarts" in state else " Restarts=0"
    facts = f"JobId=42 JobState={state} Requeue=1{restarts} ExitCode=0:0"
    programs = {"python": supervisor, "tar": "", "sleep": '[ $1 = 300 ] || exec /bin/sleep "$@"'}
    programs["scontrol"] = f'echo "$@" >> {tmp_path}/calls; echo "{facts}"'
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    ids = {"JOB": "42", "ARRAY_JOB": "40", "ARRAY_TASK": "0"}
    variables = {f"SLURM_{name}_ID": id for name, id in ids.items()}
    script = array.script().replace(str(Path.cwd()), str(tmp_path))
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env={**variables, "PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
    )  # fmt: skip
    calls = tmp_path / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_an_array_gives_each_task_its_run(tmp_path):
    array = order(names=("a", "b", "c"), runs="x", at_once=2)
    script = array.script()
    assert "--array=0-2%2" in lines(script)
    assert "--output=/runs/a/jobs/0001/logs/%a" in lines(script)
    head = script[: script.index("set -u")] + 'echo "$run $job"'
    done = subprocess.run(
        ["bash", "-c", head], env={"SLURM_ARRAY_TASK_ID": "2"}, capture_output=True, text=True
    )
    assert done.stdout == "/runs/c /runs/c/jobs/0001\n"


def test_modules_and_lines_come_before_python():
    script = order(modules=["cuda/12"], setup=["source /etc/x"], exports={"A": "b c"}).script()
    assert "module load cuda/12\nsource /etc/x\n" in script
    assert script.index("module load") < script.index(" -m forescale.slurm.batch")
    assert "export A='b c'" in script


@pytest.mark.parametrize("end", ["\n", "\r", "\x0b", "\x85", "\u2028"])
def test_a_line_break_in_a_name_adds_no_line_to_the_script(end):
    """A directory or a profile may have any name."""
    evil = f"x{end}#SBATCH --wrap=pwned{end}touch pwned"
    with pytest.raises(UserError, match="can't read; choose another directory") as caught:
        order(root=f"/tmp/{evil}").script()
    assert str(caught.value).isprintable()
    plain = replace(order(), profile=evil, names=(evil,), submissions=order().submissions)
    with pytest.raises(UserError, match=r"^--job-name"):
        plain.script()
    some = replace(order(names=("a", "b")), profile=evil, names=("a", evil))
    assert len(some.script().splitlines()) == len(
        replace(some, names=("a", "b")).script().splitlines()
    )


@pytest.mark.parametrize("key", ["partition", "gres", "options", "exclude", "modules", "scratch"])
def test_a_value_of_several_lines_is_refused(key):
    value = ["/a\rb"] if isinstance(getattr(SlurmConfig(), key), list) else "/a\nb"
    problems = replace(SlurmConfig(), **{key: value}).problems()
    assert (key, "has a line break or another control character") in [f[:2] for f in problems]
