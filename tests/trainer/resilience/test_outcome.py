"""Why a launch ended: the rank that failed first, its error or signal, a hang, a lack of memory."""

import http.server
import json
import signal
import sys
import threading
import time

import pytest

from forescale.ground.errors import CRASHED, DONE, GAVE_UP, INTERRUPTED, USER, UserError
from forescale.resilience import outcome
from forescale.resilience.diagnosis import Hang, publish_hang
from forescale.resilience.outcome import WEBHOOK, notify
from forescale.run.directory import Run

RECORD = "from pathlib import Path\nfrom forescale.resilience.outcome import write_error\n"


def test_start_and_end_are_recorded(ranks, tmp_path):
    before = time.time()
    ranks("raise SystemExit(75 * rank)")
    launch = outcome.launch_of(tmp_path)
    assert before <= launch["begun"] <= launch["ended"] <= time.time()
    assert (launch["code"], launch["how"], launch["processes"]) == (75, "interrupted", 2)
    assert launch["command"][0] == sys.executable
    assert launch["seconds"] == pytest.approx(launch["ended"] - launch["begun"], abs=0.5)
    ranks("pass")
    assert (outcome.launch_of(tmp_path)["code"], outcome.launch_of(tmp_path)["how"]) == (0, "done")


def test_the_cause_is_the_error_that_a_rank_recorded(ranks, tmp_path):
    """Rank 0 only lost its peer, though it ended first."""
    die = f"write_error(Path({str(tmp_path)!r}), 1, ValueError('too wide'))"
    code, (reported,) = ranks(f"{RECORD}if rank == 1:\n    time.sleep(0.5)\n    {die}\nos._exit(1)")
    assert code == 1
    assert reported == f"rank 1 ended with ValueError: too wide; see {tmp_path / 'rank-1.log'}"


FROZEN = "/scratch/run/metrics.jsonl: the storage fails (Stale file handle)"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["forescale: a retry", f"forescale: {FROZEN}.", "0.5 s later"], FROZEN),
        (
            ["Traceback (most recent call last):", "  in f", "OSError: no device"],
            "OSError: no device",
        ),
        (["step 1 | loss 2.0"], None),
    ],
)
def test_a_rank_that_could_write_no_error_is_quoted_from_its_log(ranks, tmp_path, lines, message):
    """Where its storage froze, its own words came to its log alone."""
    text = "\n".join(lines) + "\n"
    _, (reported,) = ranks(
        f"if rank:\n    print({text!r}, flush=True)\n    os._exit(1)\ntime.sleep(9)"
    )
    ending = f"rank 1 ended with code 1: {message}" if message else "rank 1 ended with code 1"
    assert reported == f"{ending}; see {tmp_path / 'rank-1.log'}"


def test_a_rank_of_a_job_is_quoted_from_the_log_of_its_node(tmp_path):
    outcome.record_start(tmp_path, ["srun"], 6, slurm={"nodes": ["a", "b"]})
    lines = ("4: OSError: no device", *["3: forescale: another"] * 300, "14: KeyError: 1")
    (tmp_path / "node-1.log").write_text("\n".join(lines))
    how, hint = outcome.describe_end(tmp_path, 4, 1, False)
    assert how == "rank 4 ended with code 1: OSError: no device"
    assert hint == f"see {tmp_path / 'node-1.log'}, rank 4"
    assert outcome.describe_end(tmp_path, 5, 1, False)[0] == "rank 5 ended with code 1"


def test_a_users_error_ends_with_no_second_full_stop(ranks, tmp_path):
    error = UserError("data.path", "is gone", "restore it")
    outcome.write_error(tmp_path, 0, error)
    ranks("raise SystemExit(2)")
    assert outcome.launch_of(tmp_path)["how"] == str(error).rstrip(".")


def test_a_signal_explains_more_than_an_error(ranks, tmp_path):
    die = f"write_error(Path({str(tmp_path)!r}), 0, RuntimeError('connection reset'))"
    code, (reported,) = ranks(f"{RECORD}if rank: os.kill(os.getpid(), 11)\n{die}\nos._exit(1)")
    assert code == -signal.SIGSEGV
    assert reported.startswith("rank 1 ended with SIGSEGV")


def test_a_hang_is_the_cause_of_all_later_errors(ranks, tmp_path):
    publish_hang(
        tmp_path, Hang((1,), "a", "data", 3, 9.0, "rank 1 on host a has been in data for 9 s")
    )
    _, (reported,) = ranks("os._exit(1)")
    assert reported == f"rank 1 on host a has been in data for 9 s; see {tmp_path}/hang-*.txt"


def test_a_kill_for_memory_is_recognised(ranks, tmp_path, monkeypatch):
    kills = iter((4, 5))
    monkeypatch.setattr(outcome, "kills_for_memory", lambda: next(kills))
    _, (reported,) = ranks("if rank == 0: os.kill(os.getpid(), 9)\ntime.sleep(60)")
    assert "rank 0 ended with SIGKILL: memory ran out, and the kernel killed it" in reported


def test_a_recorded_error_names_its_place(tmp_path):
    try:
        raise ValueError("one\ntwo")
    except ValueError as e:
        outcome.write_error(tmp_path, 3, e)
    text = (tmp_path / "rank-3.error").read_text()
    assert text.startswith(f"ValueError: one ({__file__}, line ")
    outcome.write_error(tmp_path, 3, UserError("disk", "is full", "free some"))
    assert (tmp_path / "rank-3.error").read_text() == "disk: is full; free some.\n"
    outcome.write_error(tmp_path / "gone", 3, ValueError())  # it must not hide the error itself


@pytest.fixture
def received(monkeypatch):
    """What a server was sent; FORESCALE_WEBHOOK is its address."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(500 if "broken" in self.path else 200)
            self.end_headers()

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(WEBHOOK, f"http://127.0.0.1:{server.server_port}/services/secret")
    yield requests
    server.shutdown()
    server.server_close()


def test_each_end_but_an_interruption_is_told(received, tmp_path):
    lines = []
    for code in (DONE, CRASHED, USER, GAVE_UP, INTERRUPTED):
        notify(Run(tmp_path / "big"), code, "Rank 1 ended with SIGKILL.", lines.append)
    assert [facts["event"] for _, _, facts in received] == [
        *("complete", "crashed", "stopped", "gave up")
    ]
    path, kind, facts = received[-1]
    assert (path, kind) == ("/services/secret", "application/json")
    assert facts["text"] == "forescale run big: gave up. Rank 1 ended with SIGKILL."
    assert (facts["run"], facts["code"], facts["content"]) == ("big", GAVE_UP, facts["text"])
    assert lines == []


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/secret", "file:///secret", "secret", "http://[secret", ""]
)
def test_a_service_that_is_not_there_is_a_line_without_its_address(tmp_path, monkeypatch, address):
    monkeypatch.setenv(WEBHOOK, address)
    lines = []
    notify(Run(tmp_path / "big"), DONE, "Done.", lines.append)
    assert len(lines) == bool(address)
    assert "secret" not in "".join(lines)


def test_a_service_that_answers_with_an_error_is_a_line(received, tmp_path, monkeypatch):
    import os

    monkeypatch.setenv(WEBHOOK, os.environ[WEBHOOK].replace("services", "broken"))
    lines = []
    notify(Run(tmp_path / "big"), DONE, "Done.", lines.append)
    assert "HTTP Error 500" in lines[0]


def test_nothing_is_sent_where_nobody_asked(tmp_path, monkeypatch):
    monkeypatch.delenv(WEBHOOK, raising=False)
    notify(Run(tmp_path / "big"), DONE, "Done.", pytest.fail)
