"""What requeues a job whose batch script is gone; SLURM's answers are stand-ins (the lab of
tests/cluster has the real ones)."""

import pytest

from forescale.ground.errors import UserError
from forescale.slurm import queue, standby


@pytest.fixture
def watched(monkeypatch):
    """watched(answers, action): what is done, while SLURM answers so of job 7, one after the other:
    with the state, the nodes, and how often the job was requeued; or not at all."""

    def run(answers, action="requeue"):
        left, done = iter(answers), []

        def show(job):
            answer = next(left, ("COMPLETING", "n1 n2 n3", 1))
            if answer is None:
                raise UserError("scontrol", "timed out", "check sinfo")
            state, nodes, restarts = answer
            facts = {"JobState": state, "NodeList": nodes, "Restarts": str(restarts)}
            return {**facts, "BatchHost": "n1"}

        monkeypatch.setattr(queue, "show", show)
        monkeypatch.setattr(queue, "hosts", str.split)
        for name in ("requeue", "cancel"):
            monkeypatch.setattr(queue, name, lambda job, name=name: done.append((name, job)))
        standby.watch("7", "0", action, every=0.0)
        return done

    return run


WELL, LOST = ("RUNNING", "n1 n2 n3", 0), ("RUNNING", "n2 n3", 0)


@pytest.mark.parametrize("action", ["requeue", "cancel"])
def test_a_job_that_lost_its_first_node_is_not_left_without_a_script(watched, action):
    assert watched([WELL, None, LOST], action) == [(action, "7")]


def test_the_loss_of_another_node_is_the_batch_scripts_to_mend(watched):
    assert watched([WELL, ("RUNNING", "n1 n3", 0)]) == []


def test_a_job_that_slurm_ends_or_has_started_again_is_left_to_it(watched):
    assert watched([("COMPLETING", "n2", 0), ("RUNNING", "n2 n3", 1)]) == []
