"""A service that wants to know gets the end of a run, by HTTP; a run doesn't need it."""

import http.server
import json
import threading

import pytest

from forescale.errors import CRASHED, DONE, GAVE_UP, INTERRUPTED, USER
from forescale.resilience.alerts import VARIABLE, tell
from forescale.run.directory import Run


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
    monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{server.server_port}/services/secret")
    yield requests
    server.shutdown()
    server.server_close()


def test_each_end_but_an_interruption_is_told(received, tmp_path):
    lines = []
    for code in (DONE, CRASHED, USER, GAVE_UP, INTERRUPTED):
        tell(Run(tmp_path / "big"), code, "Rank 1 ended with SIGKILL.", lines.append)
    assert [facts["event"] for _, _, facts in received] == [
        *("complete", "crashed", "stopped", "gave up"),
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
    monkeypatch.setenv(VARIABLE, address)
    lines = []
    tell(Run(tmp_path / "big"), DONE, "Done.", lines.append)
    assert len(lines) == bool(address)
    assert "secret" not in "".join(lines)


def test_a_service_that_answers_with_an_error_is_a_line(received, tmp_path, monkeypatch):
    import os

    monkeypatch.setenv(VARIABLE, os.environ[VARIABLE].replace("services", "broken"))
    lines = []
    tell(Run(tmp_path / "big"), DONE, "Done.", lines.append)
    assert "could not be told: HTTP Error 500" in lines[0]


def test_nothing_is_sent_where_nobody_asked(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    tell(Run(tmp_path / "big"), DONE, "Done.", pytest.fail)
