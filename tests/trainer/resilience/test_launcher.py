"""The launcher over small commands in place of ranks: codes, signals, and nobody left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from forescale.errors import DONE, INTERRUPTED, USER, UserError
from forescale.resilience import launcher as module
from forescale.resilience import outcome
from forescale.resilience.diagnosis import Hang, publish
from forescale.resilience.launcher import after, start_ranks
from forescale.storage import read_json

ROOT = Path(__file__).parents[3]
NAP = "import signal, sys, time\nprint('up', flush=True)\n"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


@pytest.mark.parametrize(
    ("code", "crashes", "action"),
    [
        *((code, crashes, "end") for code in (DONE, USER, INTERRUPTED) for crashes in (0, 1, 9)),
        *((code, 1, "restart") for code in (1, 134, -signal.SIGKILL, -signal.SIGSEGV)),
        (1, 2, "restart"),
        (-signal.SIGKILL, 2, "restart"),
        *((code, 3, "give up") for code in (1, 3, 134, -signal.SIGKILL, -signal.SIGBUS)),
        (1, 4, "give up"),
    ],
)
def test_the_restart_policy(code, crashes, action):
    assert after(code, crashes) == action


LISTEN = "from forescale.resilience.launcher import hear_wishes\nhear_wishes()\n"  # as a rank does


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Start ranks that run a snippet, which knows `rank`: (code, what was told)."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(snippet, processes=2):
        told = []
        body = f"{LISTEN}import os, time\nrank = int(os.environ['RANK'])\n"
        body += textwrap.dedent(snippet)
        code = start_ranks([sys.executable, "-c", body], processes, tmp_path, told.append)
        return code, told

    return run


def launched(attempt):
    return read_json(attempt / outcome.LAUNCH)


def test_ranks_know_who_they_are(ranks, tmp_path):
    facts = "'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'FORESCALE_ATTEMPT'"
    code, told = ranks(
        f"open('{tmp_path}/' + str(rank), 'w').write(' '.join(map(os.environ.get, ({facts}))))", 3
    )
    assert (code, told) == (0, [])
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text() == f"3 {rank} 3 127.0.0.1 {tmp_path}"


def test_all_ended_well_is_done_and_logs_are_kept(ranks, tmp_path):
    assert ranks("print('hello from', rank)\ntime.sleep(0.2 * rank)") == (0, [])
    assert (tmp_path / "rank-1.log").read_text() == "hello from 1\n"
    assert not (tmp_path / "rank-0.log").exists()  # it speaks to the terminal


def test_one_that_crashes_ends_the_others_at_once(ranks, tmp_path):
    began = time.monotonic()
    code, (told,) = ranks("if rank == 1: raise SystemExit(1)\ntime.sleep(60)")
    assert code == 1
    assert told == f"rank 1 ended with code 1; see {tmp_path / 'rank-1.log'}"
    assert time.monotonic() - began < 10
    assert launched(tmp_path)["how"] == "rank 1 ended with code 1"
    code, (told,) = ranks("if rank == 0: os.kill(os.getpid(), 9)\ntime.sleep(60)")
    assert code == -signal.SIGKILL
    assert "rank 0 ended with SIGKILL (the kernel kills so when memory runs out)" in told


LEAVE = "from pathlib import Path\nfrom forescale.resilience.outcome import leave_word\n"


def test_how_it_went_is_written_down(ranks, tmp_path):
    before = time.time()
    ranks("raise SystemExit(75 * rank)")
    found = launched(tmp_path)
    assert before <= found["begun"] <= found["ended"] <= time.time()
    assert (found["code"], found["how"], found["processes"]) == (75, "interrupted", 2)
    assert found["command"][0] == sys.executable
    ranks("pass")
    assert (launched(tmp_path)["code"], launched(tmp_path)["how"]) == (0, "done")


def test_the_cause_is_what_the_rank_itself_died_of(ranks, tmp_path):
    """Rank 0 only lost its peer, though it ended first."""
    die = f"leave_word(Path({str(tmp_path)!r}), 1, ValueError('too wide'))"
    code, (told,) = ranks(f"{LEAVE}if rank == 1:\n    time.sleep(0.5)\n    {die}\nos._exit(1)")
    assert code == 1
    assert told == f"rank 1 ended with ValueError: too wide; see {tmp_path / 'rank-1.log'}"


def test_a_signal_explains_more_than_an_error(ranks, tmp_path):
    die = f"leave_word(Path({str(tmp_path)!r}), 0, RuntimeError('connection reset'))"
    code, (told,) = ranks(f"{LEAVE}if rank: os.kill(os.getpid(), 11)\n{die}\nos._exit(1)")
    assert code == -signal.SIGSEGV
    assert told.startswith("rank 1 ended with SIGSEGV")


def test_a_hang_is_the_cause_of_all_that_follows(ranks, tmp_path):
    publish(tmp_path, Hang((1,), "a", "data", 3, 9.0, "rank 1 on host a has been in data for 9 s"))
    _, (told,) = ranks("os._exit(1)")
    assert told == f"rank 1 on host a has been in data for 9 s; see {tmp_path}/hang-*.txt"


def test_a_kill_for_memory_is_known_for_one(ranks, tmp_path, monkeypatch):
    kills = iter((4, 5))
    monkeypatch.setattr(outcome, "kills_for_memory", lambda: next(kills))
    _, (told,) = ranks("if rank == 0: os.kill(os.getpid(), 9)\ntime.sleep(60)")
    assert "rank 0 ended with SIGKILL: memory ran out, and the kernel killed it" in told


def test_words_of_an_error_name_its_place(tmp_path):
    try:
        raise ValueError("one\ntwo")
    except ValueError as e:
        outcome.leave_word(tmp_path, 3, e)
    said = (tmp_path / "rank-3.fault").read_text()
    assert said.startswith(f"ValueError: one ({__file__}, line ")
    outcome.leave_word(tmp_path, 3, UserError("disk", "is full", "free some"))
    assert (tmp_path / "rank-3.fault").read_text() == "disk: is full; free some.\n"
    outcome.leave_word(tmp_path / "gone", 3, ValueError())  # nothing may hide the fault itself


def test_a_users_fault_on_another_rank_is_said_here(ranks):
    """Rank 1's words are in its log; a user who sees code 2 and no sentence is lost."""
    said = "forescale: shard.tar: is damaged; restore it."
    code, told = ranks(
        f"if rank == 1: print('noise'); print({said!r}); raise SystemExit(2)\ntime.sleep(1)"
    )
    assert code == USER
    assert told == [said]


def test_a_users_fault_counts_more_than_its_echo(ranks):
    """Rank 0 only lost a peer; by its code the launcher would try again and again."""
    code, told = ranks("raise SystemExit(1 + rank)")
    assert code == USER
    assert len(told) == 1


def test_an_interrupted_rank_leaves_the_others_time_to_save(ranks, tmp_path):
    wait = f"time.sleep(1); open('{tmp_path}/saved', 'w')"
    assert ranks(f"if rank == 0: raise SystemExit(75)\n{wait}\nraise SystemExit(75)") == (75, [])
    assert (tmp_path / "saved").exists()


def test_it_waits_only_so_long_for_one_that_does_not_end(ranks, monkeypatch):
    monkeypatch.setattr(module.time, "monotonic", lambda real=time.monotonic: 10 * real())
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code, _ = ranks(f"{deaf}if rank == 0: raise SystemExit(2)\ntime.sleep(60)")
    assert code == USER


def test_signals_mean_afterwards_what_they_did_before(ranks):
    before = [signal.getsignal(n) for n in module.WISHES]
    ranks("pass")
    assert [signal.getsignal(n) for n in module.WISHES] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(module.WISHES)


@pytest.fixture
def launcher(tmp_path):
    """Start a launcher of its own over two ranks that run a snippet; ends with the test."""
    started = []

    def run(snippet, before="", grace=120.0, listen=LISTEN):
        code = (
            "import sys\nfrom pathlib import Path\n"
            "from forescale.resilience.launcher import start_ranks\n"
            f"{before}\n"
            f"command = [sys.executable, '-c', {listen + snippet!r}]\n"
            f"sys.exit(start_ranks(command, 2, Path({str(tmp_path)!r}), print, {grace}) % 256)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def children(process, count=2):
    """The ranks, once they are all up."""
    assert process.stdout.readline() == "up\n"
    log = Path(process.args[2].split("Path('")[1].split("'")[0]) / "rank-1.log"
    deadline = time.monotonic() + 20
    while not (log.exists() and "up" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = psutil.Process(process.pid).children()
    assert len(found) == count
    return found


def gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


@pytest.mark.parametrize("number", module.WISHES, ids=lambda n: n.name)
def test_a_signal_reaches_every_rank_as_a_wish(launcher, number):
    listening = f"signal.signal({number:d}, lambda *_: sys.exit(75))\n"
    process = launcher(NAP.replace("print", listening + "print") + "time.sleep(60)")
    ranks = children(process)
    process.send_signal(number)
    assert process.wait(20) == INTERRUPTED
    assert gone(ranks)


def test_the_ranks_die_with_a_launcher_that_is_killed(launcher):
    process = launcher(NAP.replace("print", DEAF + "print") + "time.sleep(60)")
    ranks = children(process)
    process.kill()
    process.wait()
    assert gone(ranks)


def test_a_second_interrupt_kills_ranks_that_do_not_listen(launcher):
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    process = launcher(NAP.replace("print", deaf + "print") + "time.sleep(60)")
    ranks = children(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == INTERRUPTED
    assert gone(ranks)


def test_a_signal_before_the_ranks_can_listen_is_an_interruption_too(launcher):
    process = launcher(NAP + "time.sleep(60)")  # with Python's own handler
    children(process)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    assert "ended with" not in rest  # the user knows why


def test_a_signal_while_the_ranks_are_started_reaches_all_of_them(launcher):
    """Sent between the first and the second; the second doesn't exist yet."""
    between = (
        "import os, signal, subprocess, forescale.resilience.launcher as launch\n"
        "class Slow(subprocess.Popen):\n"
        "    def __init__(self, *a, env, **k):\n"
        "        super().__init__(*a, env=env, **k)\n"
        "        if env['RANK'] == '0':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "launch.subprocess.Popen = Slow\n"
    )
    began = time.monotonic()
    process = launcher("import time\ntime.sleep(60)", before=between)
    assert process.wait(15) == INTERRUPTED
    assert time.monotonic() - began < 15


GRACE = "from forescale.resilience.launcher import Wish\nWish().listen(1.0)\n"


def test_a_rank_that_waits_ends_when_its_time_is_over(launcher, tmp_path):
    """In a call that Python doesn't come back from to run a handler."""
    # A mutex that is locked twice: its wait goes on after every signal.
    waits = "import ctypes\nm = ctypes.create_string_buffer(64)\n"
    waits += "lock = ctypes.CDLL(None).pthread_mutex_lock\nlock(m)\nlock(m)\n"
    process = launcher(GRACE + NAP + waits, grace=1.0)
    ranks = children(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == INTERRUPTED
    assert gone(ranks)
    assert "Stopping: the ranks save and end, in at most 1 s." in process.stdout.read()
    log = (tmp_path / "rank-1.log").read_text()
    assert "rank 1 could not save and end in 1 s; the checkpoint before stands." in log


def test_ranks_that_are_stopped_end_when_the_time_is_over(launcher, tmp_path):
    """They hear no signal but the one that nobody can block."""
    process = launcher(GRACE + NAP + "time.sleep(600)", grace=0.5)
    ranks = children(process)
    for rank in ranks:
        rank.suspend()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == INTERRUPTED
    assert gone(ranks)
    assert launched(tmp_path)["how"] == "interrupted"


def test_a_rank_that_saves_in_time_is_left_alone(launcher, tmp_path):
    save = f"time.sleep(1); open({str(tmp_path / 'saved')!r}, 'w'); sys.exit(75)"
    hears = "from forescale.resilience.launcher import Wish\nwish = Wish().listen(60.0)\n"
    waits = "while not wish: time.sleep(0.05)\n"
    process = launcher(hears + NAP + waits + save, listen="")  # not before it hears
    children(process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == INTERRUPTED
    assert (tmp_path / "saved").exists()


def test_a_users_fault_after_a_wish_stays_one(launcher):
    """The disk was full when it wanted to save: to come again is no use."""
    full = NAP.replace("print", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(2)); print")
    process = launcher(full + "time.sleep(60)")
    children(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == USER


def test_a_world_is_joined_by_its_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert not module.joined()
    os.environ.update(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_LOCALID="0")
    assert not module.joined(), "a batch script is no rank"
    os.environ.update(SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_STEP_ID="0")
    assert module.joined()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    assert [os.environ[name] for name in names] == ["3", "4", "1"]
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "2"})
    assert module.joined()


@pytest.mark.parametrize(("visible", "count"), [("0,1,2", 3), ("", 1), ("-1", 1), ("GPU-a", 1)])
def test_one_rank_a_visible_gpu(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert module.default_processes() == count
