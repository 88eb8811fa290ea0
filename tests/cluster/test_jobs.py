"""Jobs on a cluster as their user knows them: submitted, followed, stopped, many at once, moved."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from forescale.run.rows import read_rows
from tests.cluster.lab import Lab
from tests.cluster.submitted import ALL, Job
from tests.trainer.test_stranger import hostile


@pytest.fixture
def job(lab: Lab, tmp_path: Path, dataset: Path) -> Job:
    return Job(lab, tmp_path / "runs", "small", dataset, {"train.steps": "60"})


@contextmanager
def nodes_taken(job):
    """All nodes are another job's: nothing that is submitted meanwhile ends before one looks."""
    words = ("--parsable", "-N4", "--exclusive", "--wrap", "sleep 300")
    id = job.lab.run("sbatch", *words, cwd=job.root.parent).strip()
    yield
    job.lab.run("scancel", id)


def test_a_job_from_its_submission_to_its_end(job, lab, tmp_path):
    job.keys |= {"checkpoint.mirror": str(tmp_path / "mirror"), "slurm.allreduce": "true"}
    with nodes_taken(job):
        job.zone = "Asia/Tokyo"
        job.submit()
        job.zone = "America/Los_Angeles"  # where all times of its queue are earlier
        output = job.forescale("status")
        assert re.search(r"small +queued \(\w+\)", output), output
        with pytest.raises(AssertionError, match=f"is already in the queue, as job {job.id}"):
            job.submit()
    job.until(lambda: "step" in job.forescale("logs", "small", "follow=false"))
    assert job.until_over() == "COMPLETED", job.logs()
    log = job.forescale("logs", "small")
    assert "step 60/60 (100.0%)" in log
    assert "== Attempt 1 ended: done." in log
    assert "2 nodes passed the preflight" in job.forescale("logs", "small", "rank=null")
    (life,) = job.lives()
    (allotted,) = re.findall(r"\bNodeList=(\S+)", lab.run("scontrol", "show", "job", job.id))
    nodes = lab.run("scontrol", "show", "hostnames", allotted).split()
    assert (life["slurm"]["job"], life["slurm"]["nodes"], len(nodes)) == (job.id, nodes, 2)
    assert re.search(r"small +complete", job.forescale("status"))
    assert f"Mirrored to {tmp_path / 'mirror' / 'small'} up to step 60." in job.log
    # Submitted once more, though scratch was purged meanwhile, there is nothing to do.
    shutil.rmtree(job.run.path)
    assert "is complete" in job.ask_to_submit()
    assert len(job.lives()) == 1
    assert not lab.run("squeue", "-h").strip()


def test_stop_saves_and_is_not_requeued_and_submit_goes_on(job, tmp_path):
    job.keys["checkpoint.mirror"] = str(tmp_path / "mirror")
    job.submit(**{"train.steps": "3000"}).until_step(25)
    assert "saves and exits, and isn't requeued" in job.forescale("stop", "small")
    assert job.until_over() == "FAILED", "whoever waits for it to be done must not begin"
    assert [life["code"] for life in job.lives()] == [75]
    saved = max(job.run.checkpoint_steps())
    assert saved == job.step
    facts = json.loads(job.forescale("status", "small", "--json"))
    assert (facts["state"], facts["seconds_left"]) == ("interrupted", None)
    job.submit(**{"train.steps": "3000"}).until_step(saved + 5)
    job.forescale("stop", "small", "--now")
    assert job.until_over() == "CANCELLED"
    job.until(lambda: f" up to step {job.step}.\n" in job.log)  # SLURM's signal lets it save
    assert (tmp_path / "mirror" / job.run.checkpoint_path(job.step).relative_to(job.root)).exists()
    with pytest.raises(AssertionError, match="it neither runs on this machine nor is in the queue"):
        job.forescale("stop", "small")


EIGHT = {"slurm.nodes": "8", "train.micro_batch": "1"}


@pytest.mark.parametrize(
    ("keys", "sentences"),
    [
        ({"slurm.time": "48 h", **EIGHT}, ("48 h is beyond", "8 nodes is beyond")),
        ({"slurm.licenses": "nix"}, ("SLURM says: Invalid license specification",)),
    ],
)
def test_what_the_cluster_never_allows_is_refused_before_anything_is_written(job, keys, sentences):
    """SLURM takes the first, and lets it wait for ever."""
    with pytest.raises(AssertionError) as caught:
        job.submit(**keys)
    assert "ended with 2" in str(caught.value)
    assert all(sentence in str(caught.value) for sentence in sentences)
    assert not job.run.path.exists()


def test_a_job_that_waits_is_stopped_in_the_queue(job, lab):
    lab.run("sbatch", "-N4", "--exclusive", "--wrap", "sleep 60", cwd=job.root.parent)
    job.zone = "Asia/Tokyo"
    job.submit()
    output = job.forescale("status")
    assert re.search(r"small +queued \((Resources|Priority|None)\)", output), output
    assert "no rank has started" in job.forescale("logs", "small")
    job.zone = "America/Los_Angeles"
    assert "it was still waiting" in job.forescale("stop", "small")
    assert job.until_over() == "CANCELLED"
    assert job.lives() == []


def test_a_crash_loop_ends_by_itself(job):
    faults = ",".join(f"exit@{step}:rank1" for step in (12, 13, 14))
    job.submit(**{"checkpoint.every": "50 steps", "faults": f"[{faults}]"})
    assert job.until_over() == "FAILED"
    assert job.lab.show(job.id)["ExitCode"] == "76:0"
    assert len(job.lives()) == 3
    assert "Gave up after 3 crashes in a row without a new checkpoint" in job.log
    output = job.forescale("logs", "small")
    assert "Attempt 3 ended: rank 1 ended with" in output
    _, _, words = output.partition("node-1.log, rank 1, the rank that failed first\n")
    assert "set by the key `faults`" in words


def test_a_users_fault_is_not_tried_again(job):
    faults = {"guard.non_finite": "halt", "faults": "[nan@30]"}
    halted = Job(job.lab, job.root, "halted", job.dataset, faults).submit()
    job.submit()
    config = job.run.config  # what the ranks read; damaged after the submission
    config.write_text(config.read_text().replace("micro_batch: 2", "micro_batch: 3"))
    assert job.until_over() == "FAILED"
    assert job.lab.show(job.id)["ExitCode"] == "2:0"
    assert "its checksum differs" in job.logs()
    assert halted.until_over() == "FAILED"
    states = job.forescale("status")
    assert re.search(r"halted +halted +1 +29/150 .* - .*ended", states), states
    assert "halted: The guard halted it at step 30: the gradient is not finite." in states


def test_an_array_with_a_throttle(job, lab):
    count = 8 if ALL else 4
    job.root.parent.mkdir(exist_ok=True)
    lines = (f"r{i} train.seed={i} optimizer.learning_rate={i + 1}e-3\n" for i in range(count))
    (job.root.parent / "sweep.txt").write_text("".join(lines))
    job.name = "r0"
    keys = {"slurm.runs": "sweep.txt", "slurm.at_once": "2", "slurm.nodes": "1"}
    job.submit(**keys, **{"train.steps": "12"})
    array = job.id.partition("_")[0]
    most = 0

    def over() -> bool:
        nonlocal most
        states = lab.run("squeue", "-h", "-r", "-j", array, "-o", "%T", check=False).split()
        most = max(most, states.count("RUNNING"))
        return not states or set(states) <= {"COMPLETED"}

    job.until(over, 300)
    assert most == 2
    losses = set()
    for i in range(count):
        one = Job(lab, job.root, f"r{i}", job.dataset)
        assert one.step == 12, one.logs()
        losses.add(one.losses()[12])
        record = json.loads((one.run.jobs()[0] / "job.json").read_text())
        assert record["id"] == f"{array}_{i}"
    assert len(losses) == count


@pytest.mark.skipif(not ALL, reason="test_elastic changes the number of nodes, too")
def test_a_run_begun_on_four_nodes_goes_on_on_two(job):
    job.submit(**{"slurm.nodes": "4", "train.steps": "400"})
    job.until_step(25).forescale("stop", "small")
    job.until_over()
    saved = job.step
    keys = {"slurm.nodes": "2", "train.steps": "400"}
    job.submit(**keys).until_step(saved + 20).forescale("stop", "small")
    job.until_over()
    assert job.step > saved
    whole = Job(job.lab, job.root, "whole", job.dataset).submit(**{"train.steps": str(saved + 20)})
    assert whole.until_over() == "COMPLETED", whole.logs()

    def tokens(one: Job) -> dict[int, int]:
        return {r["step"]: r["tokens_hash"] for r in read_rows(one.run.metrics, kind="train")}

    want = tokens(whole)
    assert {step: tokens(job)[step] for step in want} == want, "the same tokens at each step"
    near = (abs(job.losses()[s] - loss) for s, loss in whole.losses().items())
    assert max(near) < 0.05, "of bf16 ranks that add in another order"
    assert [len(life["slurm"]["nodes"]) for life in job.lives()] == [4, 2]
    assert job.run.read_events(kind="numerics_changed", key="world_size")


def test_a_job_waits_for_another_to_be_done(job):
    # With nothing of the shell's environment, and so of the batch script's unless srun is told.
    keys = {"train.steps": "12", "slurm.options": '["--export=NONE"]'}
    after = Job(job.lab, job.root, "after", job.dataset, keys)
    with nodes_taken(job):
        job.submit()
        after.submit(**{"slurm.after": f"[{job.id!r}]"})
        assert re.search(r"after +queued \(Dependency\)", job.forescale("status"))
    assert after.until_over() == "COMPLETED", after.logs()
    assert job.lab.state(job.id) == "COMPLETED"
    assert after.lives()[0]["begun"] >= job.lives()[0]["ended"]


def test_a_directory_full_of_names_of_modules_replaces_none_on_any_node(job):
    """Ranks start where the job was submitted, with files like random.py and types.py there."""
    hostile(job.root.parent)
    job.submit(**{"train.steps": "12"})
    assert job.until_over() == "COMPLETED", job.logs()
    assert "replaced" not in job.log + job.forescale("logs", "small")
    assert job.step == 12
