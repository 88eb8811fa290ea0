"""What srun says of tasks that end badly, read; and which of them explains the others."""

import shlex
import subprocess
import sys
import time

import pytest

from forescale.config.schema import plain
from forescale.config.sizes import Sizes
from forescale.ground.errors import CRASHED, DONE, INTERRUPTED, USER, UserError
from forescale.resilience.diagnosis import Hang, publish_hang
from forescale.resilience.outcome import write_error
from forescale.run.directory import Run
from forescale.slurm import queue, steps
from forescale.slurm.config import SlurmConfig
from forescale.slurm.policy import outcome_of
from forescale.slurm.steps import (
    Failure,
    JobStep,
    cpus_per_rank,
    failures,
    lost_node,
    own_scratch,
)
from forescale.slurm.submission import Submission

# As srun 24.11 wrote them.
OUTPUT = """\
srun: error: n1: task 0: Exited with exit code 75
srun: Terminating StepId=1.0
srun: error: n2: task 1: Killed
srun: error: n[2-3]: tasks 2-3,5: Terminated
srun: error: n4: task 7: Out Of Memory
srun: error: n4: task 8: Segmentation fault (core dumped)
"""


# The same, when it lost a node before any rank noticed.
LOST = """\
srun: error: Node failure on n2
srun: error: n1: task 0: Killed
srun: Force Terminated StepId=1.0
"""


def test_a_node_that_slurm_lost_explains_what_follows(attempt):
    """SLURM kills the other ranks then: no node but the lost one is to blame."""
    assert (failures(LOST), lost_node(LOST)) == ([], "n2")
    outcome = outcome_of(attempt, 1, failures(LOST), False, lost_node(LOST))
    assert (outcome.code, outcome.how) == (CRASHED, "SLURM lost node n2")
    assert outcome.blamed.keys() == {"n2"}
    noticed = "srun: error: n1: task 0: Exited with exit code 1\n" + LOST
    outcome = outcome_of(attempt, 1, failures(noticed), False, lost_node(noticed))
    assert outcome.how == "rank 0 ended with code 1 (on n1)"
    assert outcome_of(attempt, 1, failures(LOST), True, lost_node(LOST)).code == INTERRUPTED


def test_each_kind_of_end():
    ends = [(f.rank, f.host, f.code) for f in failures(OUTPUT)]
    assert ends == [
        (0, "n1", 75),
        (1, "n2", -9),
        (2, "n2", -15),
        (5, "n2", -15),
        (7, "n4", -9),
        (8, "n4", -11),
    ]


# What srun 24.11 wrote where it started no task.
MEMORY = "Unable to create step for job 7: Memory required by task is not available"
BUSY = """\
srun: Job 9 step creation temporarily disabled, retrying (Requested nodes are busy)
srun: warning: can't honor --ntasks-per-node
srun: error: Unable to create step for job 9: Requested nodes are busy
"""
OPTION = "srun: unrecognized option '--nix=3'\nTry \"srun --help\" for more information\n"


@pytest.mark.parametrize(
    ("output", "refusal"),
    [
        (f"srun: error: {MEMORY}\n", MEMORY),
        (BUSY, "Unable to create step for job 9: Requested nodes are busy"),
        ("srun: fatal: --gres is damaged\n", "--gres is damaged"),
        (OPTION, "unrecognized option '--nix=3'"),
        ("", None),
        (OUTPUT, None),
        (LOST, None),
        ("srun: Step created for StepId=8.1\nsrun: error: eio_handle_mainloop: Abandoning\n", None),
        (f"forescale-now n1 making its scratch directory\nsrun: error: {MEMORY}\n", None),
    ],
)
def test_why_slurm_started_no_task(output, refusal):
    assert steps.refusal(output) == refusal


@pytest.fixture
def attempt(tmp_path):
    return Run(tmp_path / "run").new_attempt().path


def failed(rank, code, how=""):
    return Failure(rank, f"n{rank}", code, how)


GONE = UserError("data.path", "is gone", "bring it back")
ECC = RuntimeError("CUDA error: uncorrectable ECC error encountered")
ALONE = Hang((3,), "n9", "data", 5, 4.0, "rank 3 on n9 stands")
TOGETHER = Hang((0, 1), "n1, n2", "backward", 5, 4.0, "ranks 0, 1 stand")


@pytest.mark.parametrize(
    ("srun_code", "ends", "record", "expected", "how", "blamed"),
    [
        (0, [], None, (DONE, 0), "done", {}),
        # A user's fault counts, whatever the others die of.
        (143, [(0, 75), (2, -9), (1, USER)], GONE, (USER, 1), "data.path: is gone", {}),
        (137, [(0, CRASHED), (1, -9)], None, (-9, 1), "SIGKILL", {"n1"}),  # 0 lost its peer
        (1, [(0, CRASHED), (1, CRASHED), (2, -15)], ValueError("x"), (CRASHED, 1), "ValueError: x",
         {}),  # a Python error is not the node's
        (1, [(1, CRASHED)], ECC, (CRASHED, 1), "uncorrectable ECC", {"n1"}),
        (1, [(1, -9, "Out Of Memory")], None, (-9, 1), "memory ran out", {}),
        (75, [(0, 75)], None, (INTERRUPTED, 0), "", {}),
        (1, [], None, (CRASHED, 0), "srun ended with code 1, and no task did", {}),
        (1, [(0, CRASHED)], ALONE, (CRASHED, 0), "rank 3 on n9 stands", {"n9"}),
        (1, [(0, CRASHED)], TOGETHER, (CRASHED, 0), "ranks 0, 1 stand (on n0)", {}),
    ],
)  # fmt: skip
def test_how_an_attempt_ended(attempt, srun_code, ends, record, expected, how, blamed):
    if isinstance(record, Hang):
        publish_hang(attempt, record)
    elif record is not None:
        write_error(attempt, 1, record)
    outcome = outcome_of(attempt, srun_code, [failed(*end) for end in ends], False)
    assert (outcome.code, outcome.rank) == expected
    assert how in outcome.how
    assert outcome.blamed.keys() == set(blamed)


def test_ranks_that_were_asked_are_interrupted_however_they_end(attempt):
    assert outcome_of(attempt, 137, [failed(0, -9)], True).code == INTERRUPTED


def test_tasks_whose_srun_was_killed_end_before_the_next_step(tmp_path, monkeypatch):
    """They would train on for a minute, and the next step would wait for their nodes."""
    left, ended = ["7.1", "7.1"], []
    monkeypatch.setattr(queue, "newest_step", lambda job, besides: left.pop() if left else None)
    monkeypatch.setattr(queue, "end_step", ended.append)
    step = JobStep(["bash", "-c", "kill -9 $$"], {}, tmp_path / "srun.log")
    assert step.wait(lambda: False, "7") == -9
    assert ended == ["7.1", "7.1"], "until SLURM knows it no longer"
    outcome = outcome_of(tmp_path, -9, step.failures, False)
    assert (outcome.code, outcome.blamed) == (CRASHED, {})
    assert "srun was killed by SIGKILL" in outcome.how


def test_a_step_that_does_not_end_is_killed(tmp_path, monkeypatch):
    """First its tasks, through SLURM; where a node doesn't answer, then srun itself."""
    ended = []
    monkeypatch.setattr(queue, "newest_step", lambda job, besides: f"{job}.1")
    monkeypatch.setattr(queue, "end_step", ended.append)
    monkeypatch.setattr(steps, "_LAST", 0.3)
    step = JobStep([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "srun.log")
    began = time.monotonic()
    assert step.wait(lambda: time.monotonic() - began > 0.2, "7") == -9
    assert ended == ["7.1"]


def test_a_failed_task_does_not_wait_for_ever_for_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "newest_step", lambda job, besides: None)
    monkeypatch.setattr(steps, "_PATIENCE", 0.2)
    monkeypatch.setattr(steps, "_LAST", 0.2)
    code = "print('srun: error: n2: task 1: Killed', flush=True); import time; time.sleep(60)"
    step = JobStep([sys.executable, "-c", code], {}, tmp_path / "srun.log")
    assert step.wait(lambda: False, "7") == -9
    assert step.failures == [Failure(1, "n2", -9, "Killed")]


def test_the_scratch_on_a_nodes_disk_is_the_users_own(tmp_path):
    """Its name can be guessed, and code runs from it: nobody else may have made it."""
    place, link = tmp_path / "it's/mine", tmp_path / "link"
    make = lambda path: subprocess.run(  # noqa: E731
        ["bash", "-c", "\n".join(own_scratch(shlex.quote(str(path))))],
        capture_output=True,
        text=True,
    )
    assert make(place).returncode == make(place).returncode == 0
    assert place.stat().st_mode & 0o777 == 0o700
    link.symlink_to(place)
    assert make(link).returncode == 2
    assert f"{link}: belongs to another user, or is a link" in make(link).stderr


@pytest.mark.parametrize(
    ("variable", "ranks", "threads", "share"),
    [
        ("128", 8, 1, 16),
        ("72(x2),36", 4, 1, 9),  # the node with the fewest
        ("72", 8, 2, 8),  # whole cores: 9 CPUs of each are half a core too many
        ("8", 8, 2, 1),
        ("4", 8, 1, 1),
        (None, 8, 1, 1),
    ],
)
def test_ranks_share_the_cpus_of_the_job(monkeypatch, variable, ranks, threads, share):
    if variable:
        monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", variable)
    assert cpus_per_rank(SlurmConfig(tasks_per_node=ranks), threads) == share
    assert cpus_per_rank(SlurmConfig(tasks_per_node=ranks, cpus_per_task=3), threads) == 3


@pytest.mark.parametrize("name", ["SLURM_CPUS_PER_GPU", "SLURM_THREADS_PER_CORE", "SLURM_HINT"])
def test_no_cpus_are_requested_where_options_of_sbatch_count_them(monkeypatch, name):
    """srun refuses --cpus-per-gpu with --cpus-per-task, or has no room for so many."""
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "128")
    monkeypatch.setenv(name, "1")
    assert cpus_per_rank(SlurmConfig(tasks_per_node=8), 1) == 1


def command(run, settings, monkeypatch, cpus="1"):
    """The options of srun for ranks, and for the nodes before them."""
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", cpus)
    monkeypatch.setattr(steps, "_SIBLINGS", run / "none")  # of a node with a thread a core
    submission = Submission(Run(run / "run").new_job())
    submission.write(slurm=plain(settings), data=[])
    ranks = steps.ranks(submission, ["n1", "n3"], submission.run.path, run, [])
    nodes = steps.nodes(submission, ["n1", "n3"])
    return ranks[: ranks.index("-P") - 1], nodes[: nodes.index("bash")]


@pytest.mark.parametrize("keys", [{"cpus_per_task": 16}, {"exclusive": True}])
def test_each_rank_has_cores_of_its_own_near_its_gpu(tmp_path, monkeypatch, keys):
    """With the cluster's default, ranks share all cores, and neighbours are on other sockets."""
    settings = SlurmConfig(gres="gpu:8", srun=["--mpi=none"], **keys)
    ranks, nodes = command(tmp_path, settings, monkeypatch, "128")
    bound = ["--cpus-per-task=16", "--cpu-bind=cores", "--distribution=*:block", "--mpi=none"]
    assert ranks[6:10] == bound
    assert nodes[6:8] == ["--cpus-per-task=128", "--mpi=none"]


def test_tasks_get_the_environment_of_the_batch_script_whatever_the_site_sets(
    tmp_path, monkeypatch
):
    submission = Submission(Run(tmp_path / "run").new_job())
    submission.write(slurm=plain(SlurmConfig(srun=["--export=NONE"])), data=[])
    assert steps.standby(submission, "n2", [])[:2] == ["srun", "--export=ALL"]
    for words in command(tmp_path, submission.settings, monkeypatch):
        exports = [word for word in words if word.startswith("--export")]
        assert exports == ["--export=ALL", "--export=NONE"], "the user's holds: it comes last"


def test_ranks_run_on_the_hosts_of_their_attempt_alone(tmp_path, monkeypatch):
    for words in command(tmp_path, SlurmConfig(nodes=Sizes(2, 2), spares=1), monkeypatch):
        assert {"--nodes=2", "--ntasks=2", "--nodelist=n1,n3"} <= set(words)


def test_a_rank_with_one_cpu_is_bound_as_the_cluster_does(tmp_path, monkeypatch):
    """--cpu-bind=cores would hold it on one core while those of an exclusive node are idle."""
    ranks, _ = command(tmp_path, SlurmConfig(gpus_per_node=8), monkeypatch)
    assert not any("bind" in word or "cpus" in word for word in ranks)


def test_what_the_user_binds_holds(tmp_path, monkeypatch):
    settings = SlurmConfig(cpus_per_task=4, cpu_bind="verbose,rank_ldom", srun=["--cpu-bind=none"])
    ranks, _ = command(tmp_path, settings, monkeypatch)
    binds = [word for word in ranks if word.startswith("--cpu-bind")]
    assert binds == ["--cpu-bind=verbose,rank_ldom", "--cpu-bind=none"], "of two the last holds"
