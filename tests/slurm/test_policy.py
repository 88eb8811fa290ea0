"""What becomes of a job when its ranks have ended, as a pure function of codes and of the past."""

import pytest

from forescale.checkpoint.reader import FORMAT
from forescale.errors import DONE, GAVE_UP, INTERRUPTED, USER
from forescale.resilience import outcome
from forescale.run.directory import Run
from forescale.slurm.policy import Past, decide, past

NODES = ["a", "b"]


def decided(code, crashes=0, *, blamed=None, faulty=None, state="RUNNING", **more):
    found = {"is_stopped": False, "may_requeue": True, **more}
    made = Past(crashes, blamed or {}, faulty or {})
    return decide(code, made, NODES, state=state, **found)


def test_a_run_that_is_done_ends_well():
    assert (decided(DONE).action, decided(DONE).code) == ("end", 0)


def test_a_fault_of_the_users_is_never_tried_again():
    assert (decided(USER, 1).action, decided(USER, 1).code) == ("end", USER)


def test_an_interrupted_run_goes_on_in_the_queue():
    assert decided(INTERRUPTED).action == "requeue"


def test_where_the_queue_may_not_be_used_it_ends_resumable():
    found = decided(INTERRUPTED, may_requeue=False)
    assert (found.action, found.code) == ("end", INTERRUPTED)
    assert "submit it again" in found.why


def test_a_stopped_run_is_not_requeued():
    found = decided(INTERRUPTED, is_stopped=True)
    assert (found.action, found.code) == ("end", INTERRUPTED)


def test_a_run_that_was_done_before_it_was_stopped_is_done():
    assert decided(DONE, is_stopped=True).code == DONE


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED", "", "overtaken"])
@pytest.mark.parametrize("code", [INTERRUPTED, 1, -9])
def test_a_job_that_slurm_ends_is_left_to_it(code, state):
    """To requeue it would undo a cancel, or start it twice."""
    assert decided(code, 1, state=state).action == "end"


def test_a_crash_starts_again_on_the_same_nodes_and_not_for_ever():
    assert decided(1, 1).action == decided(-9, 2).action == "restart"
    found = decided(1, 3)
    assert (found.action, found.code) == ("end", GAVE_UP)
    assert "3 crashes in a row without a new checkpoint" in found.why


def test_a_node_is_left_out_when_it_was_blamed_twice():
    assert decided(-9, 1, blamed={"b": ["killed"]}).action == "restart"
    found = decided(-9, 2, blamed={"b": ["killed", "hung"]})
    assert (found.action, found.exclude) == ("requeue", ("b",))
    assert "b (killed; hung)" in found.why


def test_a_node_that_the_preflight_refused_is_left_out_at_once():
    found = decided(1, 0, faulty={"a": "has no GPU"})
    assert (found.action, found.exclude) == ("requeue", ("a",))


def test_a_node_that_is_not_of_this_job_is_no_reason_to_requeue():
    assert decided(1, 1, blamed={"z": ["killed", "killed"]}).action == "restart"


def test_a_node_that_is_down_asks_for_others():
    found = decided(1, 1, down=["b"])
    assert (found.action, found.exclude) == ("requeue", ())


class Attempts:
    """Attempts of a run, with what their launchers tell."""

    def __init__(self, path):
        self.run = Run(path)

    def add(self, code=None, *, saves=None, submission="0001", **more):
        attempt = self.run.new_attempt()
        outcome.record_start(attempt.path, ["x"], 2, slurm={"submission": submission})
        if code is not None:
            outcome.record_end(attempt.path, code, "", **more)
        if saves is not None:
            _checkpoint(self.run, saves, attempt.number)
        return self

    @property
    def past(self):
        return past(self.run, "0001")


def _checkpoint(run, step, attempt):
    from forescale.storage import write_json

    path = run.checkpoint_path(step)
    path.mkdir(parents=True)
    keys = {"position": {}, "world_size": 2, "shapes": {}, "fragments": {}, "counters": {}}
    write_json(path / "state.json", {"format": FORMAT, "attempt": attempt, **keys})


@pytest.fixture
def attempts(tmp_path):
    return Attempts(tmp_path / "run")


def test_crashes_count_over_the_lives_of_a_job(attempts):
    assert attempts.past.crashes == 0
    assert attempts.add(1).add(-9).past.crashes == 2


def test_an_end_that_nobody_saw_counts(attempts):
    """A job may be what kills its nodes."""
    assert attempts.add(None).add(None).past.crashes == 2


def test_a_new_checkpoint_makes_a_crash_the_first(attempts):
    assert attempts.add(1).add(1).add(1, saves=40).past.crashes == 1


def test_who_was_asked_to_end_has_not_crashed(attempts):
    assert attempts.add(1, stop_signal="SIGTERM").add(INTERRUPTED).past.crashes == 0


def test_another_submission_begins_to_count_anew(attempts):
    assert attempts.add(1, submission="0000").add(1).past.crashes == 1


def test_blame_is_kept(attempts):
    attempts.add(-9, blamed={"b": "killed"}).add(1, blamed={"b": "hung"}, faulty={})
    attempts.add(1, faulty={"c": "too little memory"})
    assert attempts.past.blamed == {"b": ["killed", "hung"]}
    assert attempts.past.excluded == {"b": "killed; hung", "c": "too little memory"}
    assert attempts.past.crashes == 2, "nodes that are refused before ranks start are no crash"
