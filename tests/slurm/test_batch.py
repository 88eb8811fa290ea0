"""What the batch script makes of a preflight, and of signals; without SLURM."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest

from forescale.config.compose import compose
from forescale.config.duration import Duration
from forescale.config.frozen import freeze
from forescale.config.schema import plain
from forescale.config.sizes import Sizes
from forescale.config.train import TrainJob
from forescale.ground.errors import CRASHED, DONE, INTERRUPTED, USER, UserError
from forescale.resilience import outcome
from forescale.run.directory import Run
from forescale.slurm import batch, policy, queue, steps
from forescale.slurm.batch import Batch
from forescale.slurm.config import SlurmConfig
from forescale.slurm.preflight.findings import NodeFault, PreflightReport
from forescale.slurm.submission import Submission


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A life of a job on so many nodes."""

    def batch(nodes=2, spares=0, sizes=(), **keys):
        hosts = [f"n{i}" for i in range(1, Sizes.parse(nodes).most + spares + 1)]
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", ",".join(hosts))
        monkeypatch.setattr(queue, "hosts", lambda nodelist: nodelist.split(","))
        run = Run(tmp_path / "run")
        run.path.mkdir(exist_ok=True)
        run.config.write_text(freeze(compose(TrainJob, ["run.name=run", *keys])))
        submission = Submission(run.new_job())
        slurm = SlurmConfig(nodes=Sizes.parse(nodes), spares=spares)
        facts = {"log": str(submission.path / "log"), "sizes": [*(sizes or slurm.nodes)]}
        submission.write(slurm=plain(slurm), **facts)
        return Batch(run, submission)

    return batch


def report(*faults, nodes=2):
    return PreflightReport(list(faults), [], {f"n{i}": {} for i in range(1, nodes + 1)}, None, 1.0)


def fault(host, problem="has no GPU", kind=""):
    return NodeFault(host, problem, "mend it", kind)


def test_nodes_that_are_well_are_told_in_a_line(make, capsys):
    assert make()._judge(report()) is None
    assert "2 nodes passed the preflight (1.0 s)." in capsys.readouterr().out


def test_a_fault_of_one_node_is_the_nodes(make, capsys):
    verdict = make()._judge(report(fault("n2")))
    assert verdict.faulty == {"n2": "has no GPU; mend it"}
    assert verdict.code == CRASHED
    assert "n2: has no GPU; mend it" in capsys.readouterr().out


def test_a_fault_of_all_nodes_is_the_users(make):
    verdict = make()._judge(report(fault("n1"), fault("n2")))
    assert (verdict.code, verdict.faulty) == (USER, {})
    assert "all nodes: has no GPU" in verdict.how


def test_that_nobody_came_is_not(make):
    """srun itself may have failed, or the shared storage."""
    silent = [fault(host, "never came", "silent") for host in ("n1", "n2")]
    assert make()._judge(report(*silent)).code == CRASHED


def test_a_single_node_gets_one_chance_on_another(make):
    job = make(nodes=1)
    alone = report(fault("n1"), nodes=1)
    assert job._judge(alone).faulty.keys() == {"n1"}
    attempt = job.run.new_attempt()
    outcome.record_start(attempt.path, [], 1, slurm={"submission": "0001"})
    outcome.record_end(attempt.path, CRASHED, "", faulty={"n0": "has no GPU"})
    assert job._judge(alone).code == USER


@pytest.mark.parametrize(
    ("keys", "faulty", "lost", "nodes", "sentence"),
    [
        ((2, 2), [], [], ["n1", "n2"], ""),
        ((2, 2), [], ["n2"], ["n1", "n3"], "Node n3 takes the place of n2 (it is down)."),
        ((2, 2), ["n1"], ["n3"], ["n2", "n4"], "Node n4 takes the place of n1 (has no GPU)."),
        (("1-3", 0), [], [], ["n1", "n2", "n3"], "It trains on 3 of the job's 3 nodes; slurm.no"),
        (("1-3", 0), ["n1"], ["n3"], ["n2"], "without n1 (has no GPU), without n3 (it is down)"),
        (("1-2", 1), [], ["n2"], ["n1", "n3"], "Node n3 takes the place of n2 (it is down)."),
        (("1-3", 0, [2, 1]), [], [], ["n1", "n2"], "n3 is idle: 3 nodes is no size of this run"),
        (("1-2", 1), [], [], ["n1", "n2"], "It trains on 2 of the job's 3 nodes; slurm.nodes"),
        (("2-4", 0, [4, 2]), ["n2"], [], ["n1", "n3"], "n4 is idle: 3 nodes is no size of this"),
    ],
)
def test_other_nodes_or_fewer_make_the_next_attempt(
    make, monkeypatch, capsys, keys, faulty, lost, nodes, sentence
):
    job, stood = make(*keys), []
    monkeypatch.setattr(queue, "lost", lambda job, nodes: lost)
    monkeypatch.setattr(steps, "standby", lambda _, host, words: stood.append(host) or ["true"])
    attempt = job.run.new_attempt()
    outcome.record_start(attempt.path, [], 1, slurm={"submission": "0001"})
    outcome.record_end(attempt.path, CRASHED, "", faulty=dict.fromkeys(faulty, "has no GPU"))
    job._choose_nodes()
    assert job.hosts == nodes
    assert job._environment(attempt, "1")["MASTER_ADDR"] == nodes[0]
    assert sentence in capsys.readouterr().out
    others = [host for host in job.job_hosts[1:] if host not in lost]
    assert stood[0] == nodes[-1]
    assert {*stood} == {*stood} & {*others}, "never the first node, which they watch"
    assert len(stood) == min(2, len(others))


def test_what_slurm_refuses_is_no_fault_of_a_node(make, monkeypatch, tmp_path, capsys):
    """Of a single node, either: it would be excluded, and the next one, and so on."""
    monkeypatch.setenv("FORESCALE_SCRATCH", str(tmp_path))
    monkeypatch.setattr(queue, "eligible", lambda job: None)
    line = "srun: error: Unable to create step for job 7: Memory required by task is not available"
    monkeypatch.setattr(steps, "nodes", lambda *_: ["bash", "-c", f"echo '{line}' >&2; exit 1"])
    job = make(nodes=1)
    job.submission.write(**{**job.submission.facts, "data": []})
    del job.submission.facts
    assert job._attempt_once() == CRASHED
    past = policy.past(job.run, job.name)
    assert (past.crashes, past.excluded, past.refusals) == (0, {}, 1)
    assert "(srun: Unable to create step for job 7: Memory required" in capsys.readouterr().out


def test_a_run_that_was_stopped_in_the_queue_starts_nothing(make, capsys):
    """And it doesn't end well: a job that waits for its success must not start."""
    job = make()
    job.submission.stop()
    before = {number: signal.getsignal(number) for number in batch._SIGNALS}
    try:
        assert job.supervise() == INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "Nothing to do: the job was stopped while it waited." in capsys.readouterr().out
    assert job.run.attempts() == []


def test_a_run_that_is_complete_when_its_job_starts_needs_no_rank(make, monkeypatch):
    monkeypatch.setattr(batch, "Status", lambda run: SimpleNamespace(state="complete"))
    decision = make()._is_over()
    assert (decision.action, decision.code) == ("end", DONE)


@pytest.mark.parametrize(
    ("signal", "state"),
    [
        ({"Restarts": "0", "JobState": "RUNNING"}, "RUNNING"),
        ({"Restarts": "1", "JobState": "RUNNING"}, ""),
        ({}, ""),
    ],
)
def test_a_life_that_another_one_overtook_knows_it(make, monkeypatch, signal, state):
    monkeypatch.setattr(queue, "show", lambda job: signal)
    assert make()._state() == state


def test_a_signal_is_passed_to_the_ranks_and_bounds_their_time(make):
    class Step:
        signals = 0

        def request_stop(self):
            self.signals += 1

    job = make()
    job._step = step = Step()
    assert not job._is_late()
    job._receive(signal.SIGUSR1, None)
    job._receive(signal.SIGTERM, None)
    assert (job.stop_signal, step.signals) == ("SIGUSR1", 2)
    assert job._deadline < float("inf")


def test_a_signal_comes_in_the_place_of_growth(make):
    job = make()
    job._stop(batch._GROWTH)
    job._receive(signal.SIGTERM, None)
    job._stop(batch._GROWTH)
    assert job.stop_signal == "SIGTERM"


def test_a_job_that_can_not_be_requeued_for_more_nodes_goes_on(make, monkeypatch, capsys):
    def refuse(*_):
        raise UserError("scontrol", "SLURM says: Job can not be requeued", "ask the operators")

    job, stops = make("1-2"), []
    monkeypatch.setattr(queue, "requeue", refuse)
    monkeypatch.setattr(queue, "show", lambda _: {"Restarts": "0", "JobState": "RUNNING"})
    monkeypatch.setattr(batch.signal, "signal", lambda *_: None)

    def attempt():
        stops.append(job.stop_signal)
        if len(stops) == 1:
            job._stop(batch._GROWTH)
        return DONE if stops[1:] else INTERRUPTED

    monkeypatch.setattr(job, "_attempt_once", attempt)
    assert job.supervise() == DONE
    assert (stops, job._is_late(), job._may_grow) == ([None, None], False, False)
    assert "can not be requeued; ask the operators. It goes on with" in capsys.readouterr().out


@pytest.mark.parametrize("error", [UserError("sinfo", "is away", "wait"), ZeroDivisionError("0")])
def test_a_look_for_more_nodes_that_fails_is_a_sentence(make, monkeypatch, capsys, error):
    looks = iter([False, True])

    def fail(*_):
        raise error

    job = make("1-2")
    job.settings = replace(job.settings, grow=Duration.parse("1 s"))
    monkeypatch.setattr(queue, "lost", fail)
    job._grow(SimpleNamespace(wait=lambda _: next(looks)))
    assert "Note: whether more nodes are free isn't known" in capsys.readouterr().out


@pytest.mark.parametrize("refusal", [None, OSError(28, "No space left on device")])
def test_a_look_for_silent_nodes_that_fails_is_a_sentence_and_another_follows(
    make, monkeypatch, capsys, refusal
):
    job, kills = make("1-2"), []
    answers = iter([[], ZeroDivisionError("0"), ZeroDivisionError("0"), ["n2"], ["n2"]])

    def unreachable(nodes):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def keep(number, nodes):
        assert nodes == ["n1"]
        if refusal:
            raise refusal

    monkeypatch.setattr(queue, "unreachable", unreachable)
    monkeypatch.setattr(queue, "lost", lambda *_: [])
    monkeypatch.setattr(queue, "keep_nodes", keep)
    monkeypatch.setattr(outcome, "hang_of", lambda attempt: ("hang", attempt))
    step = SimpleNamespace(process=SimpleNamespace(kill=lambda: kills.append(1)))
    is_over = SimpleNamespace(wait=lambda _: False, is_set=lambda: False)
    job._release(SimpleNamespace(path=job.run.path), is_over, step)
    out = capsys.readouterr().out
    assert out.count("whether nodes can be reached isn't known now: ZeroDivisionError: 0.") == 1
    assert ("doesn't take nodes back: OSError" in out) == bool(refusal)
    assert kills == [1] * (not refusal)
