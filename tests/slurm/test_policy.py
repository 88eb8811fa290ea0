"""What becomes of a job when its ranks have ended, as a pure function of codes and of the past."""

import pytest

from forescale.checkpoint.reader import FORMAT
from forescale.ground.errors import DONE, GAVE_UP, INTERRUPTED, USER
from forescale.resilience import outcome
from forescale.run.directory import Run
from forescale.slurm.policy import Growth, Past, chosen, decide, give_up, growth, past

NODES = ["a", "b"]


def decided(
    code, crashes=0, *, blamed=None, faulty=None, idle=0, refusals=(0, True), state="RUNNING",
    **facts,
):  # fmt: skip
    state_of = {"is_stopped": False, "may_requeue": True, **facts}
    past = Past(crashes, blamed or {}, faulty or {}, idle, *refusals)
    return decide(code, past, NODES, state=state, **state_of)


@pytest.mark.parametrize(
    ("code", "crashes", "facts", "expected", "words"),
    [
        (DONE, 0, {}, ("end", DONE), "done"),
        (DONE, 0, {"is_stopped": True}, ("end", DONE), "done"),
        (USER, 1, {}, ("end", USER), "would not help"),
        (INTERRUPTED, 0, {}, ("requeue", INTERRUPTED), "to resume"),
        (INTERRUPTED, 0, {"may_requeue": False}, ("end", INTERRUPTED), "submit it again"),
        (INTERRUPTED, 0, {"is_stopped": True}, ("end", INTERRUPTED), "stopped on request"),
        # A crash starts again on the same nodes, and not for ever.
        (1, 1, {}, ("restart", 1), "on the same nodes"),
        (-9, 2, {}, ("restart", -9), "on the same nodes"),
        (1, 3, {}, ("end", GAVE_UP), "3 crashes in a row without a new checkpoint"),
        (1, 3, {"down": ["b"], "others": ["c"]}, ("end", GAVE_UP), "3 crashes"),  # a spare node
        # SLURM started no task: it may do so later, in another allocation, or never.
        (1, 2, {"refusals": (8, False)}, ("restart", 1), "trying again"),
        (1, 0, {"refusals": (9, True)}, ("requeue", 1), "what it has granted before"),
        (1, 0, {"refusals": (9, True), "may_requeue": False}, ("end", USER), "slurm.srun"),
        (1, 0, {"refusals": (9, False)}, ("end", USER), "correct the setting that srun names"),
        (1, 0, {"refusals": (9, False), "down": ["b"]}, ("requeue", 1), "b is down"),
        # A node is blamed once, twice, or not one of this job.
        (-9, 1, {"blamed": {"b": ["killed"]}}, ("restart", -9), "on the same nodes"),
        (-9, 2, {"blamed": {"b": ["killed", "hung"]}}, ("requeue", -9, "b"), "b (killed; hung)"),
        (1, 1, {"blamed": {"z": ["killed", "killed"]}}, ("restart", 1), "on the same nodes"),
        # The preflight refused it: it is left out at once, and so are those of before, since SLURM
        # replaces the whole list with each requeue.
        (1, 0, {"faulty": {"a": "has no GPU"}}, ("requeue", 1, "a"), "a (has no GPU)"),
        (1, 0, {"faulty": {"z": "x", "a": "no clock"}}, ("requeue", 1, "a", "z"), ": a (no clock)"),
        (1, 1, {"down": ["b"]}, ("requeue", 1), "b is down"),
        # Too few others remain: none is promised.
        (1, 0, {"faulty": {"a": "x"}, "enough": False}, ("requeue", 1), "though too few nodes"),
        # A spare node takes the place of one that is left out, in the same job: it neither waits in
        # the queue nor counts as a requeue. What becomes of spare nodes moves no rank.
        (-9, 2, {"blamed": {"b": ["killed"] * 2}, "others": ["c"], "idle": 6}, ("restart", -9),
         "with a spare node in the place of b"),
        (1, 1, {"down": ["a", "b"], "others": ["c", "d"], "may_requeue": False, "enough": False},
         ("restart", 1), "with spare nodes in the places of a, b"),
        (1, 1, {"down": ["c"], "others": ["c", "d"], "faulty": {"d": "x"}}, ("restart", 1), "same"),
        # Where the number of nodes is a range, the others go on, if they are enough.
        (1, 1, {"down": ["b"], "sizes": [2, 1]}, ("restart", 1), "with 1 node instead of b"),
        (1, 0, {"faulty": {"a": ""}, "others": ["c"], "sizes": [3, 2]}, ("restart", 1), "place of"),
        (1, 1, {"down": ["b", "c"], "others": ["c", "d"], "sizes": [4, 3]}, ("requeue", 1), "down"),
        # Too few spare nodes: the queue gives others.
        (1, 0, {"down": ["b", "c"], "others": ["c"]}, ("requeue", 1), "b is down"),
        (1, 0, {"down": ["b"], "faulty": {"c": ""}, "others": ["c"]}, ("requeue", 1, "c"), "c ()"),
        (1, 0, {"faulty": {"a": "", "b": ""}, "others": ["c"]}, ("requeue", 1, "a", "b"), "b ()"),
    ],
)  # fmt: skip
def test_what_becomes_of_a_job(code, crashes, facts, expected, words):
    decision = decided(code, crashes, **facts)
    assert (decision.action, decision.code, *sorted(decision.exclude)) == expected
    assert words in decision.why
    assert decision.pause == 0


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED", ""])
@pytest.mark.parametrize("code", [INTERRUPTED, 1, -9])
def test_a_job_that_slurm_ends_is_left_to_it(code, state):
    """To requeue it would undo a cancel, or start it twice."""
    assert decided(code, 1, state=state).action == "end"


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
    assert chosen(list(current), list("abcd"), set(out), set(down), [2]) == list(nodes)


@pytest.mark.parametrize(
    ("current", "out", "down", "sizes", "nodes"),
    [
        ("abcd", "", "c", [4, 3, 2, 1], "abd"),
        ("abcd", "", "c", [4, 2], "ab"),  # three are no size at which the batch can be divided
        ("ab", "", "c", [4, 2], "ab"),
        ("ab", "a", "c", [4, 2, 1], "bd"),
        ("bd", "a", "", [4, 3], "bcd"),  # one that answers again
        ("abd", "ab", "c", [4, 3, 2], "ad"),  # too few are well for the smallest size
        ("abcd", "", "bcd", [3, 1], "a"),
    ],
)
def test_the_nodes_of_the_next_attempt_are_as_many_as_are_well(current, out, down, sizes, nodes):
    assert chosen(list(current), list("abcd"), set(out), set(down), sizes) == list(nodes)


@pytest.mark.parametrize(
    ("possible", "ahead", "price", "nodes", "gain"),
    [
        (4, 1000, 100, 4, 750),
        (3, 1000, 100, 2, 500),  # three are slower than two: the micro-batches divide badly
        (9, 1000, 749, 4, 750),
        (9, 1000, 751, None, 0),  # soon the run is complete, or the job at its time limit
        (9, 100, 76, None, 0),
        (9, -5, 0, None, 0),
        (1, 1e6, 0, None, 0),
    ],
)
def test_a_job_grows_where_the_restart_brings_more_than_it_costs(
    possible, ahead, price, nodes, gain
):
    seconds = {1: 4.0, 2: 2.0, 3: 2.5, 4: 1.0, 5: 1.0}
    expected = Growth(nodes, gain, price) if nodes else None
    assert growth(1, possible, seconds, ahead, price) == expected
    assert growth(4, 5, seconds, 1e6, 0) is None, "five are no faster"


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
    keys = {"position": {}, "world_size": 2, "shapes": {}, "fragments": [], "counters": {}}
    write_json(path / "state.json", {"format": FORMAT, "attempt": attempt, **keys})


@pytest.fixture
def attempts(tmp_path):
    return Attempts(tmp_path / "run")


@pytest.mark.parametrize(
    ("ends", "crashes"),
    [
        ([], 0),
        ([{"code": 1}, {"code": -9}], 2),  # over the lives of a job
        ([{}, {}], 2),  # nobody saw the end: a job may be what kills its nodes
        ([{"code": 1}, {"code": 1}, {"code": 1, "saves": 40}], 1),  # a new checkpoint
        ([{"code": 1, "stop_signal": "SIGTERM"}, {"code": INTERRUPTED}], 0),  # asked to end
        ([{"code": 1, "submission": "0000"}, {"code": 1}], 1),  # another submission
        ([{"code": 1}, {"code": 1, "refused": 1}, {"code": 1, "refused": 5}], 1),  # by SLURM
    ],
)
def test_crashes_in_a_row(attempts, ends, crashes):
    for end in ends:
        attempts.add(**end)
    assert attempts.past.crashes == crashes


def test_refusals_of_slurm_count_apart_until_it_starts_tasks(attempts):
    attempts.add(1, refused=5).add(1, refused=1)
    assert (attempts.past.refusals, attempts.past.has_begun) == (6, False)
    attempts.add(1)
    assert (attempts.past.refusals, attempts.past.has_begun) == (0, True)
    assert attempts.add(1, refused=1).past.refusals == 1


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
