"""A process that forks ranks: when it may, and what follows when it ends."""

import os
import signal
import sys
import time

import psutil
import pytest

from forescale.ground.errors import DONE, INTERRUPTED
from forescale.resilience.launcher import start_ranks
from forescale.resilience.outcome import launch_of
from forescale.resilience.template import Template
from tests.trainer.resilience.conftest import SERVE


@pytest.fixture
def start(tmp_path):
    """Returns a function that runs attempts of two ranks, of which each writes its parent's number:
    (codes, those numbers, lines reported). before: what the template does first."""
    templates = []

    def run(*rests, before=""):
        reported, codes, parents = [], [], []
        code = f"import os, sys, time\n{before}\n{SERVE}attempt = os.environ['FORESCALE_ATTEMPT']\n"
        code += "print(os.getppid(), file=open(attempt + '/' + os.environ['RANK'], 'w'))\n"
        command = [sys.executable, "-c", code + "exec(os.environ['REST'])"]
        templates.append(template := Template(command))
        for i, rest in enumerate(rests):
            (attempt := tmp_path / str(i)).mkdir()
            os.environ["REST"] = rest
            codes.append(start_ranks(command, 2, attempt, reported.append, template=template))
            parents.append({int((attempt / rank).read_text()) for rank in "01"})
        return codes, parents, reported

    yield run
    os.environ.pop("REST")
    for template in templates:
        template.end()


def test_all_attempts_have_their_ranks_from_one_template(start):
    codes, parents, reported = start("raise SystemExit(3)", "time.sleep(0.1)")
    assert codes == [3, DONE]
    assert parents[0] == parents[1]
    assert len(parents[0]) == 1
    assert os.getpid() not in parents[0]
    assert len(reported) == 1, "of the code"


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("import threading; threading.Thread(target=time.sleep, args=[60]).start()", "1 thread "),
        ("if 'FORESCALE_TEMPLATE' in os.environ: raise SystemExit(1)", "has ended with code 1"),
    ],
)
def test_where_it_cannot_fork_ranks_are_new_processes_and_that_is_reported_once(
    start, before, reason
):
    codes, parents, reported = start("os._exit(0)", "os._exit(0)", before=before)
    assert codes == [DONE, DONE]
    assert parents == [{os.getpid()}] * 2
    assert len(reported) == 1
    assert reason in reported[0]


def test_its_ranks_die_with_it_and_the_next_attempt_has_another(start):
    kill = "time.sleep(0.5)\nif os.environ['RANK'] == '1': os.kill(os.getppid(), 9)\ntime.sleep(60)"
    codes, parents, reported = start(kill, "time.sleep(0.1)")
    assert codes == [-signal.SIGKILL, DONE]
    assert "SIGKILL (the process that forked it has ended with SIGKILL)" in reported[0]
    assert parents[0] != parents[1]
    assert os.getpid() not in parents[1]


def test_a_rank_of_a_suspended_one_can_be_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("forescale.resilience.template._LAST", 0.5)
    template = Template([sys.executable, "-c", f"import time\n{SERVE}time.sleep(60)"])
    assert template.begin(dict(os.environ), lambda: False) == ""
    rank = template.fork(0, {}, tmp_path / "log")
    process = psutil.Process(rank.pid)
    psutil.Process(template.process.pid).suspend()
    rank.kill()
    assert rank.wait() == -signal.SIGKILL
    assert not psutil.wait_procs([process], timeout=10)[1]


def test_a_rank_of_a_suspended_one_gets_signals_and_its_exit_code_is_known(tmp_path):
    listens = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    listens += "launcher.unblock_stop_signals()\ntime.sleep(60)"
    template = Template([sys.executable, "-c", f"import signal, sys, time\n{SERVE}{listens}"])
    template.begin(dict(os.environ), lambda: False)
    rank = template.fork(0, {}, tmp_path / "log")
    psutil.Process(template.process.pid).suspend()
    rank.send_signal(signal.SIGTERM)
    while rank.poll() is None:
        time.sleep(0.01)
    assert rank.returncode == INTERRUPTED
    template.end()


def test_a_fork_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("forescale.resilience.template._FORK", 0.2)
    template = Template([sys.executable, "-c", f"import time\n{SERVE}time.sleep(60)"])
    template.begin(dict(os.environ), lambda: False)
    psutil.Process(template.process.pid).suspend()
    assert template.fork(0, {}, tmp_path / "log") is None
    assert template.process is None


def test_a_stop_signal_before_it_is_ready_starts_no_rank(tmp_path):
    class Slow(Template):
        def begin(self, *arguments):
            os.kill(os.getpid(), signal.SIGINT)
            return super().begin(*arguments)

    started = f"open({str(tmp_path / 'started')!r}, 'w')"
    command = [sys.executable, "-c", f"import time\ntime.sleep(1)\n{SERVE}{started}"]
    template = Slow(command)
    assert start_ranks(command, 2, tmp_path, print, template=template) == INTERRUPTED
    template.end()
    assert launch_of(tmp_path)["how"] == "interrupted"
    assert not (tmp_path / "started").exists()


def test_it_ends_at_a_sigterm_once_no_rank_is_left(tmp_path):
    template = Template([sys.executable, "-c", f"import time\n{SERVE}time.sleep(60)"])
    template.begin(dict(os.environ), lambda: False)
    rank = template.fork(0, {}, tmp_path / "log")
    process = template.process
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None
    rank.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL, "as its rank"
    assert rank.wait() == -signal.SIGKILL
