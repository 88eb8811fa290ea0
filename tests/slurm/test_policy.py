"""What becomes of a job when its ranks have ended, as a pure function of codes and of the past."""

import pytest

from forescale.checkpoint.reader import FORMAT
from forescale.ground.errors import DONE, GAVE_UP, INTERRUPTED, USER
from forescale.resilience import outcome
from forescale.run.directory import Run
from forescale.slurm.policy import Past, chosen, decide, give_up, past

NODES = ["a", "b"]


def decided(code, crashes=0, *, blamed=None, faulty=None, idle=0, state="RUNNING", **facts):
    state_of = {"is_stopped": False, "may_requeue": True, **facts}
    past = Past(crashes, blamed or {}, faulty or {}, idle)
    return decide(code, past, NODES, state=state, **state_of)


def test_a_run_that_is_done_ends_well():
    assert (decided(DONE).action, decided(DONE).code) == ("end", 0)


def test_a_fault_of_the_users_is_never_tried_again():
    assert (decided(USER, 1).action, decided(USER, 1).code) == ("end", USER)


def test_an_interrupted_run_goes_on_in_the_queue():
    assert decided(INTERRUPTED).action == "requeue"


def test_where_the_queue_may_not_be_used_it_ends_resumable():
    decision = decided(INTERRUPTED, may_requeue=False)
    assert (decision.action, decision.code) == ("end", INTERRUPTED)
    assert "submit it again" in decision.why


def test_a_stopped_run_is_not_requeued():
    decision = decided(INTERRUPTED, is_stopped=True)
    assert (decision.action, decision.code) == ("end", INTERRUPTED)


def test_a_run_that_was_done_before_it_was_stopped_is_done():
    assert decided(DONE, is_stopped=True).code == DONE


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED", ""])
@pytest.mark.parametrize("code", [INTERRUPTED, 1, -9])
def test_a_job_that_slurm_ends_is_left_to_it(code, state):
    """To requeue it would undo a cancel, or start it twice."""
    assert decided(code, 1, state=state).action == "end"


def test_a_crash_starts_again_on_the_same_nodes_and_not_for_ever():
    assert decided(1, 1).action == decided(-9, 2).action == "restart"
    decision = decided(1, 3)
    assert (decision.action, decision.code) == ("end", GAVE_UP)
    assert "3 crashes in a row without a new checkpoint" in decision.why


def test_a_node_is_left_out_when_it_was_blamed_twice():
    assert decided(-9, 1, blamed={"b": ["killed"]}).action == "restart"
    decision = decided(-9, 2, blamed={"b": ["killed", "hung"]})
    assert (decision.action, decision.exclude) == ("requeue", ("b",))
    assert "b (killed; hung)" in decision.why


def test_a_node_that_the_preflight_refused_is_left_out_at_once():
    decision = decided(1, 0, faulty={"a": "has no GPU"})
    assert (decision.action, decision.exclude) == ("requeue", ("a",))


def test_a_node_that_was_left_out_before_stays_out():
    """SLURM replaces the whole list with each requeue."""
    decision = decided(1, 0, faulty={"z": "has no GPU", "a": "no clock"})
    assert (decision.action, set(decision.exclude)) == ("requeue", {"a", "z"})
    assert "z" not in decision.why.replace("requeued", "")


def test_a_node_that_is_not_of_this_job_is_no_reason_to_requeue():
    assert decided(1, 1, blamed={"z": ["killed", "killed"]}).action == "restart"


def test_a_node_that_is_down_asks_for_others():
    decision = decided(1, 1, down=["b"])
    assert (decision.action, decision.exclude) == ("requeue", ())


def test_a_spare_node_takes_the_place_of_one_that_is_left_out():
    """In the same job: it neither waits in the queue nor counts as a requeue."""
    decision = decided(-9, 2, blamed={"b": ["killed", "hung"]}, others=["c"], idle=6)
    assert (decision.action, decision.pause) == ("restart", 0)
    assert decision.why == "starting again with a spare node in the place of b"
    decision = decided(1, 1, down=["a", "b"], others=["c", "d"], may_requeue=False, enough=False)
    assert decision.action == "restart"
    assert decision.why == "starting again with spare nodes in the places of a, b"


@pytest.mark.parametrize(
    ("down", "faulty"), [(["b", "c"], {}), (["b"], {"c": "x"}), ([], {"a": "x", "b": "y"})]
)
def test_where_spare_nodes_are_too_few_the_queue_gives_others(down, faulty):
    decision = decided(1, 0, down=down, faulty=faulty, others=["c"])
    assert decision.action == "requeue"
    assert set(decision.exclude) == faulty.keys()


def test_what_becomes_of_a_spare_node_moves_no_rank():
    decision = decided(1, 1, down=["c"], others=["c", "d"], faulty={"d": "has no GPU"})
    assert decision.why == "starting again on the same nodes"


def test_spare_nodes_do_not_make_crashes_endless():
    assert decided(1, 3, down=["b"], others=["c"]).code == GAVE_UP


@pytest.mark.parametrize(
    ("current", "out", "down", "nodes"),
    [
        ("ab", "", "", "ab"),
        ("ab", "a", "", "bc"),  # in the order of the job, as SLURM numbers ranks
        ("ab", "a", "c", "bd"),
        ("bc", "", "", "bc"),  # one that is well again changes nothing
        ("ab", "acd", "", "ab"),  # too few are well
        ("ab", "cd", "ab", "cd"),  # where nothing runs at all comes last
    ],
)
def test_the_nodes_of_the_next_attempt(current, out, down, nodes):
    assert chosen(list(current), list("abcd"), set(out), set(down)) == list(nodes)


def test_requeues_that_bring_nothing_wait_longer_and_longer_and_then_end():
    pauses = [decided(INTERRUPTED, idle=n, most=5).pause for n in range(1, 6)]
    assert pauses == [0, 30, 60, 120, 240]
    decision = decided(INTERRUPTED, idle=6, most=5)
    assert (decision.action, decision.code) == ("end", GAVE_UP)
    assert (
        "6 starts of the job in a row without a new checkpoint (slurm.max_requeues=5)"
        in decision.why
    )
    assert "set a longer slurm.time" in decision.why
    assert decided(INTERRUPTED, idle=1, most=0).action == "end"


def test_a_job_that_slurm_requeues_for_ever_is_ended_at_its_next_start():
    assert give_up(Past(idle=5), 5) is None
    decision = give_up(Past(faulty={"n1": "too little room"}, idle=6), 5)
    assert decision.code == GAVE_UP
    assert "repair or exclude the nodes at fault (n1)" in decision.why


def test_where_too_few_other_nodes_remain_none_is_promised():
    decision = decided(1, 0, faulty={"a": "has no GPU"}, enough=False)
    assert (decision.action, decision.exclude) == ("requeue", ())
    assert "though too few nodes remain without those at fault: a (has no GPU)" in decision.why


class Attempts:
    """Attempts of a run, with what their launchers tell."""

    def __init__(self, path):
        self.run = Run(path)

    def add(self, code=None, *, saves=None, submission="0001", restart=0, **facts):
        attempt = self.run.new_attempt()
        start = {"submission": submission, "restart": restart}
        outcome.record_start(attempt.path, ["x"], 2, slurm=start)
        if code is not None:
            outcome.record_end(attempt.path, code, "", **facts)
        if saves is not None:
            _checkpoint(self.run, saves, attempt.number)
        return self

    @property
    def past(self):
        return past(self.run, "0001")


def _checkpoint(run, step, attempt):
    from forescale.ground.storage import write_json

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


def test_starts_without_a_new_checkpoint_count_whatever_ended_them(attempts):
    assert attempts.past.idle == 0
    attempts.add(1, restart=0).add(1, restart=0)  # two attempts of one start
    assert attempts.past.idle == 1
    attempts.add(INTERRUPTED, restart=1, stop_signal="SIGUSR1").add(1, restart=2, faulty={"c": "x"})
    assert attempts.past.idle == 3
    attempts.add(None, restart=3)  # nobody saw its end
    assert attempts.past.idle == 4
    attempts.add(INTERRUPTED, restart=4, stop_signal="SIGTERM")  # as a preemption does
    assert attempts.past.idle == 4
    attempts.add(1, restart=5, saves=40).add(1, restart=5)
    assert attempts.past.idle == 0
    assert attempts.add(1, restart=6).past.idle == 1
