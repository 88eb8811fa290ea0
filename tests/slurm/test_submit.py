"""`forescale submit`, as far as it goes without SLURM: problems, the script, arrays."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from forescale.cli import main
from forescale.config.compose import compose
from forescale.plan.plan import Plan
from forescale.run.command import job_of
from forescale.slurm import queue
from forescale.slurm.config import SlurmConfig, SubmitJob
from forescale.slurm.sizes import notes_on_sizes
from forescale.slurm.submission import Submission
from forescale.slurm.submit import notes_on_cpus
from tests.trainer.small_run import make_run

ALONE = ("machine=cpu", "slurm=lab", "slurm.nodes=1")
KEYS = ("machine=cpu", "slurm=lab", "train.micro_batch=4", "train.steps=200")


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys, dataset):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))

    def run(*words):
        data = ("data=dataset", f"data.path={dataset}")
        code = main(["submit", *words, *KEYS, *data])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def test_all_problems_at_once_and_nothing_is_written(submit, tmp_path):
    wrong = ("slurm.partion=p", "slurm.mem=lots", "slurm.after=[me]", "slurm.time='5 steps'")
    code, _, err = submit("train", "x", *wrong)
    assert code == 2
    assert "slurm.partion: no such key; did you mean slurm.partition" in err
    assert "slurm.mem: 'lots' is not a size" in err
    assert "slurm.after: 'me' is not a job id" in err
    assert "slurm.time: must be a wall time" in err
    assert "slurm.time='24 h'" in err
    assert not (tmp_path / "runs").exists()


def test_runs_that_can_not_use_all_numbers_of_nodes_are_named():
    def notes(**batches):
        keys = ["train.micro_batch=4", "slurm.nodes=1-4", "data.path=data"]
        words = [[f"run.name={n}", f"train.global_batch={b}", *keys] for n, b in batches.items()]
        return notes_on_sizes([Plan(job_of(SubmitJob, [*ALONE[:2], *each])) for each in words])

    assert notes(b=8) == [], "SLURM is asked for 1 or 2"
    first, second = notes(a=16, b=8, c=16)
    assert first.startswith("a, c can use 4, 2 or 1 nodes")
    assert "of 3 nodes a run uses 2" in first
    assert second.startswith("b can use 2 or 1 nodes, and SLURM is asked for 1-4: of 4 nodes")


def test_a_dry_run_of_a_range_shows_its_sizes_beside_the_script(submit):
    code, out, err = submit("train", "x", "--dry-run", "slurm.nodes=1-4", "train.global_batch=16")
    assert code == 0
    assert "#SBATCH --nodes=" in out
    assert [line.split()[0] for line in err.splitlines() if " node" in line][-3:] == ["4", "2", "1"]


def test_a_dry_run_prints_the_script_alone_and_writes_nothing(submit, tmp_path):
    code, out, err = submit("train", "x", "--dry-run")
    assert (code, err) == (0, ""), err
    assert out.startswith("#!/bin/bash\n")
    assert f"runs=(\n    {tmp_path}/runs/x\n)" in out
    assert not (tmp_path / "runs").exists()


def test_train_is_what_is_submitted_where_nothing_is_said(submit):
    assert submit("run.name=x", "--dry-run")[0] == 0
    code, _, err = submit("generate", "x")
    assert code == 2
    assert "generate: can't be submitted; write forescale submit train" in err


@pytest.mark.parametrize(
    ("word", "sentence"),
    [("train.seed=1", "sbatch: is not on this machine's PATH"), ("slurm.mem=600M", "memory:")],
)
def test_a_job_without_slurm_or_that_cannot_fit_leaves_no_trace(submit, tmp_path, word, sentence):
    code, _, err = submit("train", "x", word)
    assert code == 2
    assert sentence in err
    assert not (tmp_path / "runs").exists()


def test_gpus_are_asked_for_where_the_machine_has_some(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "train", "x", "--dry-run"]) == 2
    assert "no GPU is requested, but machine is H100 SXM" in capsys.readouterr().err


def test_the_plan_says_that_a_partition_has_few_cpus(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sinfo").write_text('#!/bin/sh\necho "big* 16"\n')
    for name in ("sbatch", "sinfo"):
        (tmp_path / name).chmod(0o755)
    job = compose(
        SubmitJob, ["model=tiny", "slurm.gres=gpu:8", "train.global_batch=8", "train.micro_batch=1"]
    )
    assert notes_on_cpus(job) == []  # no SLURM here
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (note,) = notes_on_cpus(job)
    assert "16 CPUs for 8 ranks" in note
    (tmp_path / "sinfo").write_text("#!/bin/sh\nexit 1\n")
    assert notes_on_cpus(job) == []


def test_the_lead_is_at_least_the_grace_and_less_than_the_limit(submit):
    _, out, _ = submit("train", "x", "--dry-run", "launch.grace=90s")
    assert "--signal=B:USR1@100 " in out
    code, _, err = submit("train", "x", "launch.grace='1 h'", "slurm.time='10 min'")
    assert code == 2
    assert "slurm.time: 10 min is not longer than the" in err


def test_a_file_of_runs_is_an_array(submit, tmp_path):
    (tmp_path / "sweep.txt").write_text(
        "# learning rates\n\na optimizer.learning_rate=1e-3\nrun.name=b train.seed=7 # seed\n"
    )
    code, out, _ = submit("train", "slurm.runs=sweep.txt", "slurm.at_once=1", "--dry-run")
    assert code == 0
    assert f"{tmp_path}/runs/a\n    {tmp_path}/runs/b\n" in out
    assert "#SBATCH --array=0-1%1" in out


SBATCH = """\
[ $1 = --test-only ] && exit
count=$(cat $0.count 2>&- | wc -l)
echo >> $0.count
[ "$count" = "$(cat $0.refused 2>&-)" ] && exit 1
echo 1$count
"""


@pytest.mark.parametrize("throttle", ["", "slurm.at_once=2"])
def test_more_runs_than_an_array_may_have_are_several_arrays(
    submit, tmp_path, monkeypatch, commands, throttle
):
    """With slurm.at_once one after the other: each counts its own tasks. If SLURM refuses one, none
    is left."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    size = 'echo "MaxArraySize = 2"'
    commands(sbatch=SBATCH, squeue="", sinfo="", scancel=f'echo "$@" >> {tmp_path}/cancelled')
    commands(scontrol=f'case "$*" in *config) {size} ;; *job*) echo SubmitTime=17 ;; esac')
    (tmp_path / "sweep.txt").write_text("a\nb\nc\nd\ne\n")
    (tmp_path / "bin/sbatch.refused").write_text("2" if throttle else "")
    words = ("train", "slurm.runs=sweep.txt", *([throttle] if throttle else []))
    if throttle:
        assert submit(*words)[0] == 2
        assert (tmp_path / "cancelled").read_text().split() == ["10", "11"]
        assert not list(tmp_path.glob("runs/*/jobs/*"))
        (tmp_path / "bin/sbatch.refused").unlink()
        (tmp_path / "bin/sbatch.count").unlink()
    code, out, err = submit(*words)
    assert code == 0, err
    assert "Submitted 5 runs as array 10 and 11 and 12" in out
    jobs = {name: Submission(tmp_path / "runs" / name / "jobs/0001") for name in "abcde"}
    ids = {name: job.job for name, job in jobs.items()}
    assert ids == {"a": "10_0", "b": "10_1", "c": "11_0", "d": "11_1", "e": "12"}
    scripts = [jobs[name].script.read_text() for name in "ace"]
    assert [f"--array=0-1{'%2' if throttle else ''} " in script for script in scripts] == [1, 1, 0]
    waits = [f"--dependency=afterany:1{n}\n" in s for n, s in zip((9, 0, 1), scripts, strict=True)]
    assert waits == [False, bool(throttle), bool(throttle)]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("a\na\n", "line 2: a second run is named a"),
        ("a train.sed=1\n", "line 1: train.sed: no such key; did you mean train.seed"),
        ("a slurm.nodes=3\n", "line 1: sets a key of slurm"),
        ("# nothing\n", "names no run"),
    ],
)
def test_a_bad_line_is_named(submit, tmp_path, lines, sentence):
    (tmp_path / "sweep.txt").write_text(lines)
    code, _, err = submit("train", "slurm.runs=sweep.txt", "--dry-run")
    assert code == 2
    assert sentence in err


def test_a_file_of_runs_that_can_not_be_read_is_a_sentence(submit, tmp_path):
    """One that is missing, never ends, waits for a writer, is no text or too large."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with open(tmp_path / "large", "wb") as sparse:
        sparse.truncate(1 << 40)
    files = {"none.txt": "no such file", "/dev/zero": "is a device", "pipe": "is a pipe"}
    files |= {"latin": "isn't UTF-8", "large": "has more than", ".": "is a directory"}
    for name, sentence in files.items():
        code, _, err = submit("train", f"slurm.runs={name}", "--dry-run")
        assert code == 2
        assert sentence in err
        assert err.count("\n") == 1


def test_a_list_of_hosts_that_is_one_needs_no_slurm():
    assert queue.hosts("node7") == ["node7"]


def test_the_lead_follows_what_the_run_has_measured(tmp_path):
    """Twice the longest save and step so far; before there is any, twice what is planned."""
    from forescale.plan.plan import Plan
    from forescale.run.directory import Parent, Run
    from forescale.slurm.submit import _save_seconds

    root = f"run.root={tmp_path}"
    job = compose(SubmitJob, [*KEYS, root, "launch.grace=20s", "slurm.time=2h"])
    plan, run = Plan(job), Run(tmp_path / "first")
    assert _save_seconds(plan, run) == plan.lead_seconds
    attempt = run.new_attempt()
    attempt.start_from(Parent(0), run)
    for seconds in (30.0, 95.0, 40.0):
        attempt.event("checkpoint_saved", step=1, seconds=seconds)
    row = {"kind": "train", "step": 1, "attempt": 1, "seconds": {"compute": 4.0, "data": 1.0}}
    attempt.metrics.add(row)
    assert _save_seconds(plan, run) == 100.0
    assert job.lead(_save_seconds(plan, run)) == 210
    assert job.lead(1.0) == 30, "never less than the grace, and the way of the signal"


def test_a_secret_among_the_variables_of_the_ranks_is_refused():
    """It would be stored in job.sbatch; sbatch passes the environment on without that."""
    problems = SlurmConfig(exports={"WANDB_API_KEY": "x", "HF_TOKEN": "y", "TOKENS": "3", "A": "b"})
    names = [problem.split()[0] for key, problem, _ in problems.problems() if key == "exports"]
    assert names == ["WANDB_API_KEY", "HF_TOKEN"]


def test_a_complete_run_is_not_submitted_again(tmp_path, monkeypatch, capsys, dataset):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))  # no sbatch
    run = make_run(dataset, Path("runs"), "small")
    before = sorted(run.path.rglob("*"))
    assert main(["submit", "train", "small", *ALONE]) == 0
    assert "small is complete: 8 steps are trained. It is not" in capsys.readouterr().out
    assert sorted(run.path.rglob("*")) == before
    words = ("schedule=wsd", "train.steps=9")  # a longer one is another matter
    assert main(["submit", "train", "small", *words, *ALONE]) == 2
    assert "is complete" not in capsys.readouterr().out


README = (Path(__file__).parents[2] / "slurm/README.md").read_text()
COMMANDS = re.findall(
    r"^forescale ((?:plan|submit) .+)$", README.replace("\\\n", " "), re.MULTILINE
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_manual_is_accepted(command, tmp_path, monkeypatch, capsys, dataset):
    """As a dry run; `big` exists where it is named alone. Notes are of the tiny data."""
    monkeypatch.chdir(tmp_path)
    sizes = ("model.num_layers=1", "model.width=32", "model.num_heads=2", "train.steps=30000")
    batch = ("train.global_batch=64", "train.micro_batch=1")
    words = shlex.split(re.sub(r"/data/\w+", str(dataset), command), comments=True)
    if "recipe=llama-7b" not in words:
        run = make_run(dataset, Path("runs"), "big", *sizes, *batch, "checkpoint.every=10000 steps")
        for step in (10_000, 20_000, 30_000) if "eval" in words else ():
            shutil.copytree(run.checkpoint_path(8), run.checkpoint_path(step))
    lines = "\n".join(f"run.name={n} train.steps=9" for n in "ab")
    (tmp_path / "sweep.txt").write_text(lines)
    if words[0] == "submit":
        words += ["--dry-run"] * ("--dry-run" not in words)
    code = main(words)
    out, err = capsys.readouterr()
    assert (code, err.partition("\nSizes")[0]) == (0, ""), err
    assert out.startswith("#!/bin/bash\n") == (words[0] == "submit")
    assert all("The data is read" in line for line in out.splitlines() if line.startswith("Note:"))


@pytest.mark.parametrize(
    ("words", "nodes"),
    [
        (("slurm.nodes=1-4",), "1-2"),  # two micro-batches a step
        (("slurm.nodes=1-4", "train.global_batch=24"), "1-3"),
        (("slurm.nodes=1-4", "train.global_batch=20"), "1"),
        (("slurm.nodes=2-4", "train.global_batch=20", "train.invariant=true"), "2-4"),
        (("slurm.nodes=1-4", "train.global_batch=16", "slurm.spares=1"), "2-5"),
    ],
)
def test_slurm_is_asked_for_the_numbers_of_nodes_that_the_run_can_use(submit, words, nodes):
    code, out, err = submit("train", "x", "--dry-run", "train.global_batch=8", *words)
    assert code == 0, err
    assert f"#SBATCH --nodes={nodes}" in re.split(r"  #|\n", out)
    assert "#SBATCH --no-kill" in out
