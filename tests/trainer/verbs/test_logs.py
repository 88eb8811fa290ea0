"""`forescale logs` and `stop` of runs on this machine."""

import signal
import time
from contextlib import suppress

import psutil
import pytest

from forescale.resilience import outcome
from forescale.run.directory import Run
from tests.trainer.small_run import make_run


@pytest.fixture
def run(small_data, tmp_path, monkeypatch) -> Run:
    """A run whose newest attempt crashed: rank 1 failed, rank 0 lost it."""
    monkeypatch.chdir(tmp_path)
    run = make_run(small_data, "runs", "small")
    path = run.new_attempt().path
    outcome.record_start(path, ["x"], 2)
    (path / "rank-0.log").write_text("".join(f"step {i}\n" for i in range(100)))
    (path / "rank-1.log").write_text("begun\nValueError: nine\n")
    return run


def test_a_failed_attempt_shows_the_end_of_the_first_failed_ranks_log(run, forescale):
    path = run.attempts()[-1].path
    outcome.record_end(path, 1, "rank 1 ended with ValueError: nine", 1)
    code, out, _ = forescale("logs", "small", "lines=3")
    assert code == 0
    assert out.splitlines() == [
        f"== {path}/rank-0.log",
        *["step 97", "step 98", "step 99"],
        "== Attempt 2 ended: rank 1 ended with ValueError: nine.",
        f"== {path}/rank-1.log, the rank that failed first",
        *["begun", "ValueError: nine"],
    ]
    _, out, _ = forescale("logs", "small", "rank=1")
    assert "begun\nValueError: nine\n" in out
    assert "failed first" not in out, "it was just shown"


def test_it_follows_until_the_attempt_ends(run, forescale, monkeypatch):
    path, naps = run.attempts()[-1].path, []

    def nap(seconds):
        """What happens meanwhile."""
        naps.append(seconds)
        if len(naps) == 2:
            with open(path / "rank-0.log", "a") as f:
                f.write("one more\n")
        if len(naps) == 4:
            outcome.record_end(path, 0, "done")

    monkeypatch.setattr(time, "sleep", nap)
    _, out, _ = forescale("logs", "small", "lines=1")
    assert "step 99\none more\n== Attempt 2 ended: done.\n" in out
    assert len(naps) >= 4


def test_a_newer_attempt_ends_it_too(run, forescale):
    newer = run.new_attempt().path
    outcome.record_start(newer, ["x"], 2)
    _, out, _ = forescale("logs", "small", "attempt=2", "lines=1")
    assert out.splitlines()[-1] == "step 99"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("rank=7",), 0, "Rank 7 of small has no log yet"),
        (("attempt=9",), 2, "has no attempt 9"),
        (("rank=null",), 2, "was never submitted"),
    ],
)
def test_what_is_not_there(run, forescale, words, code, said):
    found, out, err = forescale("logs", "small", *words)
    assert found == code
    assert said in out + err


def test_rank_0_of_a_local_run_prints_to_its_terminal(own_run, forescale):
    outcome.record_start(own_run.attempts()[-1].path, ["x"], 1)
    assert "prints to the terminal that started it" in forescale("logs", "small")[1]


@pytest.mark.parametrize(("words", "number"), [((), signal.SIGTERM), (("--now",), signal.SIGKILL)])
def test_stop_asks_the_launcher(run, forescale, words, number):
    """And no other process with the same process id."""
    process = psutil.Popen(["sleep", "60"])
    try:
        path = run.attempts()[-1].path
        outcome.add_to_launch(path, pid=process.pid, begun=process.create_time() - 10)
        code, _, err = forescale("stop", "small", *words)
        assert code == 2, "that one is younger than the attempt"
        assert "neither runs on this machine" in err
        outcome.add_to_launch(path, begun=process.create_time() + 10)
        assert forescale("stop", "small", *words)[0] == 0
        assert process.wait(10) == -number
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()
