"""Ranks in containers, and Python as a command of several words: what srun and bash are given.

Neither Pyxis nor Apptainer can be had for these tests. `srun` and `apptainer` are stand-ins that do
what their manuals say: refuse to mount what doesn't exist, and prefer the variables of the image.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from forescale.config.schema import plain
from forescale.config.sizes import Sizes
from forescale.ground.errors import UserError
from forescale.run.directory import Run
from forescale.slurm import containers, steps
from forescale.slurm.config import SlurmConfig
from forescale.slurm.script import Order
from forescale.slurm.submission import Submission

IMAGE = '{"PYTHONPATH": "/of/the/image", "MINE": "of the image"}'
STAND_IN = f"""\
#!{sys.executable} -P
import json, os, sys
from pathlib import Path
words, image = sys.argv[1:], {IMAGE}
name = Path(sys.argv[0]).name
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
options = []
while words[0].startswith("-") or words[0] == "exec":
    options.append(words.pop(0))
    if options[-1] in ("--bind", "--pwd"):
        options[-1] += "=" + words.pop(0)
given = dict(option.split("=", 1) for option in options if "=" in option)
for mount in given.get("--container-mounts", given.get("--bind", "")).split(","):
    if mount and not Path(mount.split(":")[0]).exists():
        sys.exit(f"{{name}}: can't mount {{mount}}")
if name == "apptainer":
    os.environ |= image
    os.chdir(given["--pwd"])
    words.pop(0)
if name == "sbcast":
    words = [os.environ.get("SBCAST", "cp"), *words]
os.execvp(words[0], words)
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A folder with the stand-ins on PATH, and what the batch script has exported."""
    tools, here = tmp_path / "tools", tmp_path / "here"
    for path in (tools, here, tmp_path / "data", tmp_path / "root"):
        path.mkdir()
    for name in ("srun", "apptainer", "sbcast"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("FORESCALE_SCRATCH", str(tmp_path / "scratch/forescale-0"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("FORESCALE_NODE", str(tmp_path / "scratch/forescale-0/job-1"))
    monkeypatch.setenv("PYTHONPATH", "/code,frozen")
    return tmp_path


def submission(bench: Path, **keys) -> Submission:
    job = Submission(Run(bench / "root/first").new_job())
    subprocess.run(["tar", "-cf", job.code, "-T", "/dev/null"], check=True)
    job.write(slurm=plain(SlurmConfig(**keys)), data=[str(bench / "data"), "s3://bucket/more"])
    return job


def calls(bench: Path) -> list[list[str]]:
    return [json.loads(line) for line in (bench / "calls").read_text().splitlines()]


@pytest.mark.parametrize(
    ("keys", "runtime"),
    [
        ({"container": "/images/x.sif"}, "apptainer"),
        ({"container": "/images/x.sqsh"}, "pyxis"),
        ({"container": "nvcr.io#nvidia/pytorch:25.09-py3"}, "pyxis"),
        ({"container": "/sandbox/", "runtime": "apptainer"}, "apptainer"),
        ({"container": "x.sif", "runtime": "singularity"}, "singularity"),
    ],
)
def test_the_image_says_what_runs_it(bench, keys, runtime):
    job = submission(bench, **keys)
    assert containers.prefix(job)[:1] == ([] if runtime == "pyxis" else [runtime])
    assert bool(containers.options(job)) == (runtime == "pyxis")
    assert containers.python(job.settings) == ["python3"]


def test_what_a_rank_reads_and_writes_is_mounted_where_it_is(bench):
    job = submission(bench, container="x", mounts=["/opt", "/a:/b"])
    folders = [bench / name for name in ("data", "here", "root", "scratch/forescale-0")]
    expected = ",".join([*(f"{path}:{path}" for path in folders), "/opt:/opt", "/a:/b"])
    command = steps.ranks(job, ["n1"], job.run.path, bench, [])
    assert f"--container-mounts={expected}" in command
    assert f"--container-workdir={bench / 'here'}" in command
    assert command[-5:] == ["python3", "-P", "-m", "forescale.slurm.rank", str(job.run.path)]


def test_a_path_that_a_list_of_mounts_can_not_hold_is_a_sentence(bench, monkeypatch):
    (bench / "a,b").mkdir()
    monkeypatch.chdir(bench / "a,b")
    with pytest.raises(UserError, match="has a comma or a colon"):
        containers.mounts(submission(bench, container="x"))


@pytest.mark.parametrize(
    ("image", "srun"), [("x.sqsh", ["--container-writable"]), ("x.sif", ["--mpi=none"])]
)
def test_the_scratch_directory_is_there_before_it_is_mounted(bench, image, srun):
    """On each node the host makes it; a mount of what is missing would fail."""
    job = submission(bench, container=image, preflight=False, srun=srun)
    done = subprocess.run(steps.nodes(job, ["n1"]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (bench / "scratch/forescale-0/job-1").is_dir()
    first, last = calls(bench)
    assert not any("container" in word for word in first[: first.index("bash")])
    assert last[0] == ("apptainer" if image == "x.sif" else "srun")


def test_in_apptainer_the_code_is_that_of_the_job_and_gpus_are_shown(bench):
    (bench / "scratch/forescale-0").mkdir(parents=True)
    code = "import json, os; e = os.environ; "
    code += "print(json.dumps([os.getcwd(), e['PYTHONPATH'], e['MINE']]))"
    job = submission(bench, container="x.sif", gres="gpu:2")
    done = subprocess.run(
        [*containers.prefix(job), sys.executable, "-c", code], capture_output=True, text=True
    )
    assert json.loads(done.stdout) == [str(bench / "here"), "/code,frozen", "of the image"]
    assert calls(bench)[0][:3] == ["apptainer", "exec", "--nv"]
    assert "--nv" not in containers.prefix(submission(bench, container="x.sif"))


def test_amd_s_gpus_are_shown_in_apptainer(bench, monkeypatch):
    monkeypatch.setattr(containers, "AMD", bench)
    for nvidia, option in ((bench / "none", "--rocm"), (bench, "--nv")):
        monkeypatch.setattr(containers, "NVIDIA", nvidia)
        words = containers.prefix(submission(bench, container="x.sif", gres="gpu:2"))
        assert words[:3] == ["apptainer", "exec", option]


def batch_words(bench: Path, **keys) -> list[str]:
    job = Submission(bench / "root/first/jobs/0001")
    script = Order(["first"], [job.run.path], [job], SlurmConfig(**keys), 70).script()
    (line,) = (line for line in script.splitlines() if "-m forescale.slurm.batch" in line)
    return shlex.split(line)


def test_python_of_several_words_is_kept_as_words(bench):
    text = "conda run -n 'my $env' python"
    words = ["conda", "run", "-n", "my $env", "python", "-P", "-m"]
    assert batch_words(bench, python=text)[:7] == words
    job = submission(bench, python=text)
    command = steps.ranks(job, ["n1"], job.run.path, bench, [])
    assert command[command.index("conda") :][:7] == words
    look = steps.nodes(job, ["n1"])[-1].splitlines()[-1]
    assert shlex.split(look)[1:8] == words


def test_the_standby_stays_outside_of_an_image(bench):
    job = submission(bench, container="x.sqsh", srun=["--container-writable", "--mpi=none"])
    words = steps.standby(job, "n2", ["7", "0", "requeue"])
    assert "--mpi=none" in words
    assert not any(word.startswith("--container") for word in words)
    assert shlex.split(words[-1].splitlines()[-1])[1] == sys.executable


def test_the_batch_script_stays_outside_of_an_image(bench):
    """SLURM's commands are rarely in one."""
    for keys in ({"python": "singularity exec x.sif python3"}, {"container": "x", "python": "p"}):
        assert batch_words(bench, **keys)[0] == sys.executable


@pytest.mark.parametrize(
    ("sbcast", "nodes"), [("cp", 17), ("false", 17), ("truncate", 17), ("cp", 16)]
)
def test_many_nodes_get_the_packed_environment_from_each_other(bench, monkeypatch, sbcast, nodes):
    """Beyond 16 nodes, once, where one lacks it; if that fails or ends early, from shared storage.
    The stand-in for srun is a node; that for sbcast copies to it."""
    (bench / "tools/truncate").write_text('#!/bin/bash\nhead -c 1000 "$1" > "$2"\n')
    (bench / "tools/truncate").chmod(0o755)
    monkeypatch.setenv("SBCAST", sbcast)
    (bench / "venv/bin").mkdir(parents=True)
    (bench / "venv/bin/python").write_text("#!/bin/bash\necho packed Python\n" + "#" * 20_000)
    (bench / "venv/bin/python").chmod(0o755)
    tar = bench / "venv-7.tar"
    subprocess.run(["tar", "-cf", tar, "-C", bench / "venv", "."], check=True)
    job, hosts = submission(bench), [f"n{i}" for i in range(nodes)]
    job.write(**{**job.facts, "environment": str(tar)})
    for attempt in range(2):
        command = steps.nodes(Submission(job.path), hosts[:2], hosts)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "packed Python"
        assert ("sbcast failed" in done.stderr) == (sbcast == "false" and not attempt)
    names = [call[0] for call in calls(bench)]
    assert names == (["srun", "sbcast", "srun", "srun", "srun"] if nodes > 16 else ["srun"] * 2)
    assert ",".join(hosts) in str(calls(bench)[0]) or nodes == 16, "spare nodes, too"
    scratch = bench / "scratch/forescale-0"
    assert [p.name for p in scratch.glob("environment*")] == ["environment-venv-7"]


def test_an_environment_is_packed_beyond_16_nodes_unless_a_key_says_otherwise(monkeypatch):
    many, few = Sizes(2, 17), Sizes(1, 16)
    monkeypatch.setattr(sys, "prefix", "/a/venv")
    assert [SlurmConfig(nodes=n).packs for n in (few, many)] == [False, True]
    assert [SlurmConfig(nodes=n, pack=True).packs for n in (few, many)] == [True, True]
    others = ({"pack": False}, {"python": "conda run python"}, {"container": "x.sif"})
    assert not any(SlurmConfig(nodes=many, **keys).packs for keys in others)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert not SlurmConfig(nodes=many).packs
