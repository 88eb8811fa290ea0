"""Studies and trials in the queue: arrays, a branch that waits for its trunk, killed commands."""

import sys
from pathlib import Path

import pytest

from forescale.scaling.study.directory import Study
from tests.cluster.lab import Lab
from tests.cluster.submitted import Job

PLAN = [
    *("plan.kind=list", "plan.runs=[[1.5e4,2e4],[1.5e4,6e4],[3e4,2e4],[5e4,2e4]]"),
    *("plan.cap=1e12", "plan.seeds=[1,1]", "plan.sequence_length=128", "plan.micro_batch=2"),
]
OF_ALL = ["data=dataset", "optimizer=adamw", "train.compile=off", "launch.grace=15 s"]
OF_JOBS = ["machine=cpu", "slurm.nodes=1", "slurm.allreduce=false", "slurm.time=20 min"]


@pytest.fixture
def job(lab: Lab, tmp_path: Path, dataset: Path) -> Job:
    return Job(lab, tmp_path / "runs", "small", dataset)


def test_a_study_in_the_queue_outlives_its_launcher(job, lab, dataset):
    job.root.parent.mkdir(exist_ok=True)
    job.forescale("study", "plan", "study=tiny", *PLAN, "--", *OF_ALL, f"data.path={dataset}")
    study = Study(job.root.parent / "studies/tiny")
    launch = ["study", "launch", "study=tiny", "launch.slurm=lab", "launch.at_once=2"]
    launch += ["--", *OF_JOBS, f"slurm.scratch={lab.scratch}"]
    command = [sys.executable, "-P", "-m", "forescale", *launch]
    options = {"cwd": job.root.parent, "env": {"OMP_NUM_THREADS": "1"}}
    # Killed once two are submitted, when it waits for the queue: not while it submits another one.
    watch = '"$@" & until [ "$(grep -c cell_submitted studies/tiny/events.jsonl)" -ge 2 ]; '
    watch += "do kill -0 $! || exit 1; sleep 0.1; done; kill -KILL $!"
    lab.run("sh", "-c", watch, "sh", *command, **options, seconds=300)
    printed = lab.run(*command, **options, seconds=300)
    assert "Nothing is left to run" in printed
    study = Study(study.folder)
    assert {s.status for s in study.states()} == {"complete"}
    submitted = [e["cell"] for e in study.events if e["kind"] == "cell_submitted"]
    assert sorted(set(submitted)) == sorted(c.name for c in study.plan.cells)
    jobs = [len(study.run(c.name).jobs()) for c in study.plan.cells]
    assert set(jobs) == {1}, "no cell in the queue was submitted again"
    (branch,) = (c for c in study.plan.cells if c.trunk)
    script = (study.run(branch.name).jobs()[0] / "job.sbatch").read_text()
    (time,) = (e["time"] for e in study.events if e["kind"] == "cell_submitted"
               if e["cell"] == branch.name)  # fmt: skip
    if time < study.run(branch.trunk).read_events(kind="ended")[-1]["time"]:
        assert "--dependency=afterok:" in script
    (attempt,) = study.run(branch.name).attempts()
    assert attempt.parent.step == branch.trunk_step
    assert branch.trunk in str(attempt.parent.checkpoint)


def test_a_trial_in_the_queue_goes_on_where_its_command_was_stopped(job, lab, dataset):
    job.root.parent.mkdir(exist_ok=True)
    base = [*OF_ALL, f"data.path={dataset}", "train.steps=4", "train.sequence_length=32"]
    options = f"[{','.join([*OF_JOBS, f'slurm.scratch={lab.scratch}'])}]"
    words = ["try", "gelu", f"base=[{','.join(base)}]", "pairs=2", "slurm=lab", "at_once=4"]
    words += [f"submit={options}", "--", "model.mlp=gelu"]
    command = [sys.executable, "-P", "-m", "forescale", *words]
    keys = {"cwd": job.root.parent, "env": {"OMP_NUM_THREADS": "1"}}
    printed = lab.run("timeout", "-s", "INT", "20", *command, check=False, **keys)
    printed += lab.run(*command, **keys, seconds=300)
    assert "gelu, first seeds, pair 2: " in printed
    campaign = job.root.parent / "campaigns/first"
    submitted = [path.read_text() for path in sorted((campaign / "waves").glob("*.txt"))]
    for name in ("base-s1", "base-s2", "gelu-s1", "gelu-s2"):
        assert sum(f"run.name={name}" in text for text in submitted) == 1, "once, by one of both"
