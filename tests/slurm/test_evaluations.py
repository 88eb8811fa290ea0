"""`forescale submit eval`: which checkpoints, with which script, and what a task of the array does.
SLURM's commands are stand-ins (the lab of tests/cluster has the real ones)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forescale.checkpoint.retention import is_pinned
from forescale.cli import main
from forescale.config.schema import plain
from forescale.ground.errors import UserError
from forescale.ground.storage import read_json, write_checked_json
from forescale.run.directory import Parent, Run
from forescale.run.start import start
from forescale.slurm import command_task
from forescale.slurm.config import SlurmConfig
from forescale.slurm.login import remembered
from forescale.slurm.submission import Submission
from tests.trainer.small_run import make_job


@pytest.fixture
def run(dataset, tmp_path, monkeypatch) -> Run:
    """A run of 8 steps that saves each second one, and has saved 2 and 4."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    start(make_job(dataset, tmp_path / "runs", "small", "checkpoint.every=2 steps"))
    small = Run(tmp_path / "runs/small")
    for step in (2, 4):
        small.checkpoint_path(step).mkdir(parents=True)
    return small


@pytest.fixture
def in_queue(run, commands):
    """The run's training is job 17, which waits."""
    training = Submission(run.new_job())
    training.script.write_text(f"jobs=(\n    {training.path}\n)\n")
    training.submitted("17", training.script, "lab", 1764172905.0)
    line = f"17|PENDING|None|0:00|1:00||N/A|1764172905|{training.script}"
    show = f"UserId=me({os.getuid()}) Command={training.script}"
    commands(squeue=f"echo '{line}'", sbatch="exit 1")  # where it is, there is a queue
    commands(scontrol=f'[ "$2" = config ] && echo ClusterName = lab || echo "{show}"')


@pytest.fixture
def submit(run, capsys):
    def command(*words: str) -> tuple[int, str, str]:
        code = main(["submit", "eval", "small", *words])
        output = capsys.readouterr()
        return code, output.out, output.err

    return command


def options(script: str) -> list[str]:
    lines = (x for x in script.splitlines() if x.startswith("#SBATCH "))
    return [x.removeprefix("#SBATCH ").partition("  #")[0] for x in lines]


def files(run: Run) -> set[Path]:
    return {path for path in run.path.rglob("*") if path.name != "jobs"}


def test_each_checkpoint_that_exists_is_a_task_and_a_dry_run_writes_nothing(submit, run, tmp_path):
    before = files(run)
    settings = (f"slurm.python={tmp_path}/say", f"slurm.scratch={tmp_path}/scratch")
    code, script, _ = submit("--dry-run", "windows=4", "slurm.at_once=1", *settings)
    assert code == 0
    assert "--array=0-1%1" in options(script)
    assert not [x for x in options(script) if x.startswith(("--dependency", "--signal"))]
    assert {"--nodes=1", "--ntasks-per-node=1", "--requeue", "--open-mode=truncate"} <= set(
        options(script)
    )
    assert files(run) == before
    # As bash runs it, for the second task.
    (tmp_path / "say").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "say").chmod(0o755)
    environment = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "5", "PATH": "/usr/bin:/bin"}
    body = script.replace("tar -xf", "true")
    done = subprocess.run(["bash", "-c", body], env=environment, capture_output=True, text=True)
    folder = run.path / "evaluations/NNNN"
    words = f"4 eval {run.path} windows=4 step=4"
    assert done.stdout == f"-P -m forescale.slurm.command_task {folder} {words}\n", done.stderr


def test_steps_to_come_wait_for_the_training_job_and_the_others_do_not(submit, run, in_queue):
    code, out, _ = submit("--dry-run", "steps=[4,6,8]", "slurm.after=[12]")
    assert code == 0
    _, here, to_come = out.split("#!/bin/bash\n")
    assert f"0) set -- 4 eval {run.path} step=4 ;;" in here
    assert "--dependency=afterok:12" in options(here)
    assert f"1) set -- 8 eval {run.path} step=8 ;;" in to_come
    assert "--dependency=after:17,afterok:12" in options(to_come)


def test_without_a_job_that_trains_there_is_a_sentence(submit):
    code, out, err = submit("--dry-run", "steps=6")
    assert (code, out) == (2, "")
    assert (
        "no job of this run is in the queue, and it has no checkpoint of step 6; give first: "
        in err
    )
    assert "forescale submit train small" in err


def test_a_run_without_data_of_its_own_is_refused_before_it_waits_in_the_queue(submit, run):
    """As one of imported weights is, unless the command says what to score it on."""
    identity = read_json(run.identity)
    identity["dataset"]["sources"] = {}
    write_checked_json(run.identity, identity)
    before = files(run)
    for words in ((), ("--dry-run",)):
        code, out, err = submit(*words)
        assert (code, out) == (2, "")
        assert "small: holds imported weights, and was trained on no data that is known" in err
        assert err.endswith("; give data.path=DIR.\n")
    assert files(run) == before
    for words in ("data.path=books", "abilities=[copy]", "tasks=[mine.yaml]"):
        assert submit("--dry-run", words)[0] == 0


def test_a_job_of_somebody_else_is_not_waited_for(submit, in_queue, commands):
    commands(scontrol="echo 'UserId=other(1) Command=/home/other/job.sbatch'")
    code, _, err = submit("--dry-run", "steps=6")
    assert code == 2
    assert "which SLURM doesn't know as a job of yours" in err


def test_all_steps_that_will_never_be_there_are_refused_together(submit, run, in_queue):
    code, _, err = submit("steps=[1,7,10,4]")
    assert code == 2
    assert (
        "steps: the run is past step 1, and has no checkpoint of it; choose of these: 2, 4." in err
    )
    assert "no checkpoint is planned for step 7; choose another, or give checkpoint.at=[7]" in err
    assert "10 is after the last step of the run, 8" in err
    assert not is_pinned(run, 4)


def test_what_is_submitted_is_pinned_and_says_where_its_scores_will_be(
    submit, run, in_queue, commands
):
    commands(sbatch="[ $1 = --test-only ] || { cat $0.count 2>&- | wc -l; echo >> $0.count; }")
    code, out, err = submit("steps=[4,6,8]")
    assert code == 0, err
    assert [is_pinned(run, step) for step in (2, 4, 6, 8)] == [False, True, True, True]
    first, second = (Submission(run.path / "evaluations" / name) for name in ("0001", "0002"))
    assert [first.job, second.job] == ["0", "1"]
    assert "Submitted array 0: step 4 of small.\n" in out
    assert "Submitted array 1: steps 6, 8 of small, each when job 17 has saved it.\n" in out
    assert f"Scores: {second.path}/step-00000006.log" in out
    assert "Follow them: squeue --jobs=0,1. Stop them: scancel 0 1" in out
    (second.links / "1").write_text("as sbatch writes")
    assert (second.path / "step-00000008.log").read_text() == "as sbatch writes"
    assert second.code.exists()
    assert len(run.jobs()) == 1, "they are no jobs that train"


def test_if_slurm_refuses_one_array_nothing_of_any_is_left(
    submit, run, in_queue, commands, tmp_path
):
    run.checkpoint_path(4).with_suffix(".pin").touch()  # by the user
    commands(sbatch='grep -q dependency "$2" && echo no >&2 && exit 1; echo 41')
    commands(scancel=f"echo $1 > {tmp_path}/cancelled; exit 1")  # it is there no more
    code, _, err = submit("steps=[2,4,6]")
    assert code == 2
    assert "sbatch: SLURM says: no" in err
    assert (tmp_path / "cancelled").read_text() == "41\n"
    assert list((run.path / "evaluations").iterdir()) == []
    assert [is_pinned(run, step) for step in (2, 4, 6)] == [False, True, False]


def test_an_evaluation_takes_one_gpu_where_the_training_took_many(submit, run, monkeypatch):
    trained = SlurmConfig(
        nodes=8, gres="gpu:h100:8", exclusive=True, account="us", setup=["source x"], mem="64G"
    )
    (file := remembered._file(run.path)).parent.mkdir(parents=True)
    file.write_text(json.dumps({"slurm": plain(trained)}))
    code, script, _ = submit("--dry-run", "slurm.account=them", "slurm.mem=8G")
    assert code == 0
    lines = {"--gres=gpu:h100:1", "--nodes=1", "--account=them", "--mem=8G"}
    assert lines <= set(options(script))
    assert "--exclusive" not in options(script)
    assert "\nsource x\n" in script
    code, _, err = submit("--dry-run", "slurm.nodes=2")
    assert code == 2
    assert "slurm.nodes: an evaluation is one process" in err


@pytest.fixture
def task(run, commands, tmp_path):
    """A task of an array of evaluations, in a process of its own: its output."""
    commands(say='echo "$@"')
    submission = Submission(run.new_evaluations())
    submission.write(slurm=plain(SlurmConfig(python="say")), data=[])
    environment = {**os.environ, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}
    environment |= {"SLURM_JOB_ID": "43", "FORESCALE_NODE": str(tmp_path / "node")}

    def start(step: int | str, *words: str) -> tuple[int, str]:
        words = words or ("eval", "small", f"step={step}")
        command = [sys.executable, "-P", "-m", "forescale.slurm.command_task"]
        done = subprocess.run(
            [*command, str(submission.path), str(step), *words],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return start


def test_a_command_of_another_verb_needs_no_checkpoint(task):
    assert task("-", "export", "small") == (0, "-P -m forescale export small\n")


def test_a_task_becomes_the_evaluation_of_its_checkpoint(task):
    assert task(4) == (0, "-P -m forescale eval small step=4\n")


@pytest.mark.parametrize(
    ("image", "begin"),
    [("image.sif", ["apptainer", "exec"]), ("image", ["srun", "--export=ALL"])],
)
def test_a_task_scores_in_the_container_of_the_run(run, monkeypatch, tmp_path, image, begin):
    monkeypatch.setenv("FORESCALE_SCRATCH", str(tmp_path / "scratch"))
    submission = Submission(run.new_evaluations())
    settings = SlurmConfig(container=image, tasks_per_node=1)
    submission.write(slurm=plain(settings), data=["/data/books"])
    command = command_task._command(submission, ["eval", "small", "step=4"])
    assert command[: len(begin)] == begin
    assert command[-7:] == ["python3", "-P", "-m", "forescale", "eval", "small", "step=4"]
    assert "/data/books:/data/books" in " ".join(command)


def test_a_task_whose_checkpoint_is_to_come_is_requeued_by_the_pace_of_the_run(
    task, run, in_queue, commands, tmp_path
):
    attempt = run.new_attempt()
    attempt.start_from(Parent(0), run)
    seconds = {"data": 100.0, "compute": 300.0}
    attempt.metrics.add({"kind": "train", "step": 4, "attempt": 1, "seconds": seconds})
    # As SLURM does, it ends this start of the task, at once.
    commands(scontrol=f'echo "$@" >> {tmp_path}/calls; [ $1 = requeue ] && kill -TERM $PPID; true')
    _, output = task(8)
    assert "at step 4 and has not saved step 8 yet; this task looks again in 13 min." in output
    assert (tmp_path / "calls").read_text() == (
        "requeue 40_2\nupdate JobId=40_2 StartTime=now+800\n"
    )


def test_a_task_whose_checkpoint_never_comes_ends_with_a_sentence(run, in_queue, commands):
    folder = str(Submission(run.new_evaluations()).path)
    with pytest.raises(UserError, match="no such checkpoint, and no job of the run that will save"):
        command_task.main([folder, "3", "eval", "small"])  # the run is past it
    commands(squeue="true", sbatch="true")
    again = r"give forescale submit train small, and forescale submit eval small steps=\[8\]"
    with pytest.raises(UserError, match=again):
        command_task.main([folder, "8", "eval", "small"])
