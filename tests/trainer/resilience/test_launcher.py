"""The launcher with small commands in place of ranks: exit codes, signals, no process left over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from forescale.ground.errors import CRASHED, DONE, GAVE_UP, INTERRUPTED, USER, UserError
from forescale.resilience import launcher as module
from forescale.resilience import outcome
from forescale.resilience.elastic import LocalSizes, gpus
from forescale.resilience.launcher import next_action
from forescale.run.directory import Run
from tests.launching import LISTEN
from tests.trainer.resilience.conftest import SERVE

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
    assert next_action(code, crashes) == action


@pytest.fixture
def launches(tmp_path, monkeypatch):
    """Returns a function that runs attempts on an empty run. Each argument is what the ranks of one
    attempt do: (exit code, function of the run). It returns the exit code and the attempts.
    sizes: see LocalSizes; then it returns the numbers of ranks and their GPUs too."""
    run = Run(tmp_path / "run")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    def go(*ways, sizes=None):
        todo, attempts, ranks = list(ways), [], []

        def start_ranks(command, processes, attempt, report, grace, stop, devices, *_):
            attempts.append(int(attempt.name))
            ranks.append((processes, devices))
            outcome.record_start(attempt, command, processes)
            code, act = todo.pop(0)
            act(run)
            return code

        monkeypatch.setattr(module, "start_ranks", start_ranks)
        code = module.run_attempts(run, [], LocalSizes(sizes or [1], is_fixed=sizes is None))
        return (code, ranks) if sizes else (code, attempts)

    return go


def do_nothing(run):
    pass


def roll_back(run):
    run.new_attempt()


def be_overtaken(run):
    outcome.record_start(run.new_attempt().path, ["forescale", "train"], 2)


def test_a_crash_is_followed_by_another_attempt(launches):
    assert launches((CRASHED, do_nothing), (DONE, do_nothing)) == (DONE, [1, 2])


def test_an_attempt_begun_by_a_rollback_is_the_launchers_own(launches):
    assert launches((CRASHED, roll_back), (DONE, do_nothing)) == (DONE, [1, 3])


def test_a_launcher_leaves_the_run_to_a_newer_one(launches):
    with pytest.raises(UserError, match="another launcher has started attempt 2 meanwhile"):
        launches((CRASHED, be_overtaken), (DONE, do_nothing))


def fail(how, rank=0):
    return lambda run: outcome.record_end(run.attempts()[-1].path, CRASHED, how, rank)


def save(run):
    run.checkpoint_path(7).mkdir(parents=True)


MEMORY = (CRASHED, fail("rank 1 ended with SIGKILL: memory ran out, and the kernel killed it"))


def test_fewer_ranks_go_on_where_memory_ran_out_until_a_checkpoint(launches, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    saved = (CRASHED, lambda run: (save(run), fail("rank 0 ended with code 1")(run)))
    code, ranks = launches(MEMORY, MEMORY, MEMORY, saved, (DONE, do_nothing), sizes=[8, 4, 2, 1])
    assert (code, [n for n, _ in ranks]) == (DONE, [4, 2, 1, 1, 4])
    assert launches(MEMORY, MEMORY, MEMORY, sizes=[1])[0] == GAVE_UP


def test_the_ranks_leave_out_a_gpu_that_failed_and_one_that_is_gone(launches, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-c,3")
    failed = (CRASHED, fail("rank 1 ended with RuntimeError: CUDA error: unknown error", 1))
    lost = (CRASHED, lambda run: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1"))
    code, ranks = launches(failed, lost, (DONE, do_nothing), sizes=[4, 3, 2, 1])
    assert code == DONE
    assert ranks == [(4, ["0", "1", "GPU-c", "3"]), (3, ["0", "GPU-c", "3"]), (1, ["0"])]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="has 1 GPU, and the job can run at 4 or 2"):
        launches(sizes=[4, 2])


def test_too_few_gpus_for_a_restart_are_the_recorded_end(launches, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    runs = []
    lost = lambda run: (runs.append(run), monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0"))  # noqa: E731
    assert launches((CRASHED, lost), sizes=[2]) == (USER, [(2, ["0", "1"])])
    end = outcome.launch_of(runs[0].attempts()[-1].path)
    assert end["code"] == USER
    assert "this machine has 1 GPU, and the job can run at 2" in end["how"]
    out, err = capsys.readouterr()
    assert "Restarting" not in out
    assert end["how"] in err


def test_a_stop_signal_between_two_attempts_is_recorded_and_starts_no_rank(tmp_path, monkeypatch):
    run, sizes = Run(tmp_path / "run"), LocalSizes([1], is_fixed=True)
    monkeypatch.setattr(sizes, "has_shrunk", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    path = tmp_path / "starts"
    command = [sys.executable, "-c", f"print(file=open({str(path)!r}, 'a'))\nraise SystemExit(3)"]
    assert module.run_attempts(run, command, sizes) == INTERRUPTED
    assert [outcome.launch_of(a.path)["code"] for a in run.attempts()] == [3, INTERRUPTED]
    assert path.read_text() == "\n"


def test_a_gpu_that_the_driver_no_longer_lists_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,3")
    assert gpus(tmp_path / "none") == ["0", "1", "3"]
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert gpus(tmp_path) == ["0", "1"]


def test_ranks_get_their_environment(ranks, tmp_path):
    facts = "'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'FORESCALE_ATTEMPT'"
    code, reported = ranks(
        f"open('{tmp_path}/' + str(rank), 'w').write(' '.join(map(os.environ.get, ({facts}))))", 3
    )
    assert (code, reported) == (0, [])
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text() == f"3 {rank} 3 127.0.0.1 {tmp_path}"


def test_successful_ranks_mean_done_and_logs_are_kept(ranks, tmp_path):
    assert ranks("print('hello from', rank)\ntime.sleep(0.2 * rank)") == (0, [])
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}.log").read_text() == f"hello from {rank}\n"


def test_a_crash_ends_the_other_ranks_at_once(ranks, tmp_path):
    began = time.monotonic()
    code, (reported,) = ranks("if rank == 1: raise SystemExit(1)\ntime.sleep(60)")
    assert code == 1
    assert reported == f"rank 1 ended with code 1; see {tmp_path / 'rank-1.log'}"
    assert time.monotonic() - began < 10
    assert outcome.launch_of(tmp_path)["how"] == "rank 1 ended with code 1"
    code, (reported,) = ranks("if rank == 0: os.kill(os.getpid(), 9)\ntime.sleep(60)")
    assert code == -signal.SIGKILL
    assert "rank 0 ended with SIGKILL (the kernel sends it when memory runs out)" in reported


def test_a_users_error_on_another_rank_is_reported_here(ranks):
    """Rank 1 prints to its log; a user who sees code 2 without a message is lost."""
    text = "forescale: shard.tar: is damaged; restore it."
    code, reported = ranks(
        f"if rank == 1: print('noise'); print({text!r}); raise SystemExit(2)\ntime.sleep(1)"
    )
    assert code == USER
    assert reported == [text]


def test_a_users_error_counts_more_than_its_consequence(ranks):
    """Rank 0 only lost a peer; by its code the launcher would try again and again."""
    code, reported = ranks("raise SystemExit(1 + rank)")
    assert code == USER
    assert len(reported) == 1


def test_the_others_have_time_to_save_when_one_rank_is_interrupted(ranks, tmp_path):
    wait = f"time.sleep(1); open('{tmp_path}/saved', 'w')"
    assert ranks(f"if rank == 0: raise SystemExit(75)\n{wait}\nraise SystemExit(75)") == (75, [])
    assert (tmp_path / "saved").exists()


def test_a_rank_that_does_not_exit_is_killed_after_a_while(ranks, monkeypatch):
    monkeypatch.setattr(module.time, "monotonic", lambda real=time.monotonic: 10 * real())
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code, _ = ranks(f"{deaf}if rank == 0: raise SystemExit(2)\ntime.sleep(60)")
    assert code == USER


def test_signal_handlers_are_restored(ranks):
    before = [signal.getsignal(n) for n in module.STOP_SIGNALS]
    ranks("pass")
    assert [signal.getsignal(n) for n in module.STOP_SIGNALS] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(module.STOP_SIGNALS)


@pytest.fixture(params=["", "template=Template(command)"], ids=["new", "forked"])
def launcher(tmp_path, request):
    """Returns a function that starts a launcher process with two ranks that run a snippet."""
    started = []

    def run(snippet, before="", grace=120.0, listen=LISTEN):
        code = (
            "import sys\nfrom pathlib import Path\n"
            "from forescale.resilience.launcher import start_ranks\n"
            "from forescale.resilience.template import Template\n"
            f"{before}\n"
            f"command = [sys.executable, '-c', {SERVE + listen + snippet!r}]\n"
            f"path = Path({str(tmp_path)!r})\n"
            f"sys.exit(start_ranks(command, 2, path, print, {grace}, {request.param}) % 256)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def children(process, count=2):
    """Return the ranks, once all of them are up."""
    assert process.stdout.readline() == "up\n"
    log = Path(process.args[2].split("Path('")[1].split("'")[0]) / "rank-1.log"
    deadline = time.monotonic() + 20
    while not (log.exists() and "up" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    every = psutil.Process(process.pid).children(recursive=True)
    ranks = [p for p in every if not p.children() and "output.py" not in " ".join(p.cmdline())]
    assert len(ranks) == count
    return ranks


def gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


@pytest.mark.parametrize("number", module.STOP_SIGNALS, ids=lambda n: n.name)
def test_a_signal_reaches_every_rank(launcher, number):
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


def test_a_second_interrupt_kills_ranks_that_ignore_signals(launcher):
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    process = launcher(NAP.replace("print", deaf + "print") + "time.sleep(60)")
    ranks = children(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == INTERRUPTED
    assert gone(ranks)


def test_a_signal_before_the_ranks_handle_it_is_an_interruption_too(launcher):
    process = launcher(NAP + "time.sleep(60)")  # with Python's own handler
    children(process)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    assert "ended with" not in rest  # the user sent it


def test_a_signal_while_the_ranks_are_started_reaches_all_of_them(launcher):
    """The signal comes between the first rank and the second, which doesn't exist yet."""
    between = (
        "import os, signal, subprocess\n"
        "class Slow(subprocess.Popen):\n"
        "    def __init__(self, *a, env=None, **k):\n"
        "        super().__init__(*a, env=env, **k)\n"
        "        if env and env.get('RANK') == '0':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "subprocess.Popen = Slow\n"
        "class Template(Template):\n"
        "    def fork(self, rank, *a):\n"
        "        return (super().fork(rank, *a), rank or os.kill(os.getpid(), signal.SIGTERM))[0]\n"
    )
    began = time.monotonic()
    process = launcher("import time\ntime.sleep(60)", before=between)
    assert process.wait(15) == INTERRUPTED
    assert time.monotonic() - began < 15


GRACE = "from forescale.resilience.launcher import StopRequest\nStopRequest().listen(1.0)\n"


def test_a_blocked_rank_exits_when_its_time_is_over(launcher, tmp_path):
    """It waits in a call that doesn't return to Python for a handler."""
    # A mutex that is locked twice: its wait goes on after every signal.
    waits = "import ctypes\nm = ctypes.create_string_buffer(64)\n"
    waits += "lock = ctypes.CDLL(None).pthread_mutex_lock\nlock(m)\nlock(m)\n"
    process = launcher(GRACE + NAP + waits, grace=1.0)
    ranks = children(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == INTERRUPTED
    assert gone(ranks)
    assert "Stopping: the ranks save and exit within 1 s." in process.stdout.read()
    log = (tmp_path / "rank-1.log").read_text()
    assert "rank 1 could not save and exit in 1 s; the last checkpoint remains." in log


@pytest.mark.slow  # the time has to be over
def test_suspended_ranks_are_killed_when_the_time_is_over(launcher, tmp_path):
    """They receive no signal but SIGKILL."""
    process = launcher(GRACE + NAP + "time.sleep(600)", grace=0.5)
    ranks = children(process)
    for rank in ranks:
        rank.suspend()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == INTERRUPTED
    assert gone(ranks)
    assert outcome.launch_of(tmp_path)["how"] == "interrupted"


def test_a_rank_that_saves_in_time_is_left_alone(launcher, tmp_path):
    save = f"time.sleep(1); open({str(tmp_path / 'saved')!r}, 'w'); sys.exit(75)"
    hears = (
        "from forescale.resilience.launcher import StopRequest\nstop = StopRequest().listen(60.0)\n"
    )
    waits = "while not stop: time.sleep(0.05)\n"
    process = launcher(hears + NAP + waits + save, listen="")  # blocked until it listens
    children(process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == INTERRUPTED
    assert (tmp_path / "saved").exists()


def test_a_users_error_after_a_stop_request_stays_one(launcher):
    """The disk was full when it wanted to save: a restart would not help."""
    full = NAP.replace("print", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(2)); print")
    process = launcher(full + "time.sleep(60)")
    children(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == USER


def test_a_rank_is_recognised_by_its_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert not module.started_as_rank()
    os.environ.update(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_LOCALID="0")
    assert not module.started_as_rank(), "a batch script is not a rank"
    os.environ.update(SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_STEP_ID="0")
    assert module.started_as_rank()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    assert [os.environ[name] for name in names] == ["3", "4", "1"]
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "2"})
    assert module.started_as_rank()


@pytest.mark.parametrize(("visible", "count"), [("0,1,2", 3), ("", 2), ("-1", 2), ("GPU-a", 1)])
def test_one_rank_per_visible_gpu_or_as_many_as_can_share_the_cores(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert module.default_processes(lambda ranks: ranks <= 2) == count
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert module.default_processes(lambda ranks: True) == (1 if count == 2 else count)
