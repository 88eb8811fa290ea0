"""Steps whose tasks fork ranks, with two processes of a script in place of srun."""

import errno
import socket
import sys

import pytest

from forescale.slurm import queue
from forescale.slurm.steps import Failure
from forescale.slurm.warm import WarmStep
from tests.trainer.resilience.conftest import SERVE

SRUN = """
import os, signal, subprocess, sys
def task(rank):
    names = {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"}
    names |= {"LOCAL_RANK": "0", "SLURM_NODEID": str(rank)}
    return subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, **names})
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
tasks, code = [task(0), task(1)], 0
for _ in tasks:
    pid, status = os.wait()
    rank, bad = [one.pid for one in tasks].index(pid), os.waitstatus_to_exitcode(status)
    if bad and not code:
        how = "Killed" if bad == -9 else f"Exited with exit code {bad}"
        print(f"srun: error: n{rank + 1}: task {rank}: {how}", flush=True)
        code = bad
        os.kill(tasks[1 - rank].pid, 9)  # as --kill-on-bad-exit=1
sys.exit(bool(code))
"""

# Until rank 0 has said who its parent is: on a busy machine it may be killed before.
WAIT = "zero = os.environ['AT'] + '/0'\n"
WAIT += "while not (os.path.isfile(zero) and os.path.getsize(zero)): time.sleep(0.01)\n"


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Returns a function that starts a step, and another that runs an attempt of it: what both
    ranks do; it returns the code and the parents of the ranks."""
    monkeypatch.setattr(queue, "newest_step", lambda *_, **__: None)

    def start(before=""):
        body = f"import os, sys, time\n{before}\n{SERVE}rank = int(os.environ['RANK'])\n"
        body += "print(os.getppid(), file=open(f'{os.environ[\"AT\"]}/{rank}', 'w'))\n"
        command = [sys.executable, "-c", SRUN, body + "exec(os.environ['REST'])"]
        at = {"AT": str(tmp_path), "REST": "raise SystemExit(4)"}  # where no order comes
        return WarmStep(command, at, tmp_path / "srun.log", ["localhost"], 2)

    def train(step, name, rest):
        (attempt := tmp_path / "attempts" / name).mkdir(parents=True)
        variables = {"AT": str(attempt), "REST": rest}
        code = step.train(attempt, variables, lambda: False, "1")
        return code, [int((attempt / rank).read_text()) for rank in "01"]

    return start, train


def test_one_step_has_the_ranks_of_several_attempts(step, tmp_path):
    start, train = step
    step = start()
    crash = f"{WAIT}if rank:\n  os.write(2, b'last')\n  sys.exit(3)\ntime.sleep(60)"
    code, parents = train(step, "0001", crash)
    assert (code, step.is_warm) == (1, True)
    assert step.failures == [Failure(1, "n2", 3, "")], "not of the rank that was killed for it"
    code, again = train(step, "0002", "print('rank', rank)")
    assert (code, step.failures, again) == (0, [], parents)
    logs = [(tmp_path / f"attempts/000{i}/node-1.log").read_text() for i in (1, 2)]
    assert logs == ["1: last\n", "1: rank 1\n"]
    assert step.finish(lambda: False, "1") == 0


def test_what_srun_says_counts_where_a_template_is_killed(step):
    start, train = step
    step = start()
    code, _ = train(step, "0001", f"{WAIT}if rank: os.kill(os.getppid(), 9)\ntime.sleep(60)")
    assert (code, step.is_over, step.is_warm) == (1, True, False)
    assert step.failures == [Failure(1, "n2", -9, "Killed")]


def test_tasks_that_cannot_fork_are_ranks_of_one_attempt(step, tmp_path):
    start, _ = step
    step = start("import threading\nthreading.Thread(target=time.sleep, args=[9]).start()")
    assert step.train(tmp_path, {}, lambda: False, "1") == 1
    assert (step.is_over, step.is_warm) == (True, False)
    assert [failure.code for failure in step.failures] == [4], "with the variables of the step"


def test_a_stop_reaches_ranks_that_do_not_listen_yet(step):
    start, train = step
    step = start()
    train(step, "0001", "")
    step.request_stop()
    listen = "stop = launcher.StopRequest().listen()\nwhile not stop: time.sleep(0.01)\n"
    assert train(step, "0002", f"{listen}sys.exit(75)")[0] == 1
    assert {failure.code for failure in step.failures} == {75}
    step.finish(lambda: False, "1")


def test_who_lacks_the_token_is_no_task(step):
    start, train = step
    step = start()
    with socket.create_connection(step._server.getsockname()) as stranger:
        stranger.sendall(b'{"token": "wrong", "rank": 1, "host": "n9"}\nnothing\n')
        assert train(step, "0001", "")[0] == 0
        assert stranger.recv(1) == b"", "it was closed"
    assert step.finish(lambda: False, "1") == 0


@pytest.mark.parametrize("sent", [b"[" * 4000 + b"\n", b" " * 4096], ids=["deep", "endless"])
def test_bytes_of_a_stranger_harm_no_step(step, monkeypatch, sent):
    start, train = step
    step, accept, errors = start(), socket.socket.accept, [errno.ECONNABORTED, errno.EMFILE]

    def fails_at_first(server):
        if errors:
            raise OSError(errors.pop(), "refused")
        return accept(server)

    monkeypatch.setattr(socket.socket, "accept", fails_at_first)
    with socket.create_connection(step._server.getsockname()) as stranger:
        stranger.sendall(sent)
        assert train(step, "0001", "")[0] == 0
        stranger.settimeout(10)
        assert stranger.recv(1) == b"", "it was closed"
    assert (errors, step.finish(lambda: False, "1")) == ([], 0)
