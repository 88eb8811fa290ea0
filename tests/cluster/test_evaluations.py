"""Evaluations that are submitted before there is a checkpoint."""

from pathlib import Path

from tests.cluster.lab import Lab
from tests.cluster.submitted import Job


def test_checkpoints_are_evaluated_once_the_run_has_saved_them(
    lab: Lab, tmp_path: Path, dataset: Path
):
    """Both are to come, so their tasks look for them in vain at first; and the run would delete the
    first of them before its end, if it weren't pinned."""
    job = Job(lab, tmp_path / "runs", "small", dataset, {"train.steps": "60"})
    job.root.parent.mkdir(exist_ok=True)
    wait = ["sbatch", "--parsable", "-N4", "--exclusive", "--wrap", "sleep 600"]
    others = lab.run(*wait, cwd=job.root.parent).strip()
    job.submit()
    output = job.forescale("submit", "eval", "small", "steps=[20,60]", "windows=8")
    array = output.partition("Submitted array ")[2].partition(":")[0]
    assert f"each when job {job.id} has saved it" in output
    tasks = [f"{array}_0", f"{array}_1"]
    job.until(lambda: {lab.show(task)["Reason"] for task in tasks} == {"Dependency"})
    lab.run("scancel", others)
    assert job.until_over() == "COMPLETED", job.logs()
    assert job.run.checkpoint_steps() == [20, 40, 60]

    def logs() -> list[str]:
        folder = job.run.path / "evaluations/0001"
        texts = [p.read_text() for p in sorted(folder.glob("step-*.log"))]
        return [text[max(0, text.find("Run small")) :] for text in texts]  # without the progress

    over = {"COMPLETED", "FAILED", "CANCELLED"}
    job.until(lambda: {lab.state(task) for task in tasks} <= over, 300)
    assert [lab.state(task) for task in tasks] == ["COMPLETED"] * 2, logs()
    assert [int(lab.show(task)["Restarts"]) > 0 for task in tasks] == [True, True]
    by_hand = [job.forescale("eval", "small", f"step={n}", "windows=8") for n in (20, 60)]
    assert logs() == by_hand
    assert len(job.lives()) == 1
