"""Several clients at once: who waits, who is refused, and what one that left or was late costs."""

import json
import socket
import threading
import time

import pytest
import torch

from forescale.inference.view import RunView
from tests.trainer.serving.client import LIKELIEST, ask, serving


class Gate(torch.nn.Module):
    """Writes a token whenever it is let."""

    def __init__(self):
        super().__init__()
        self.weight, self.open = torch.nn.Parameter(torch.zeros(1)), threading.Semaphore(0)
        self.tokens, self.entered = 0, False

    def forward(self, tokens_BL):
        self.entered = True
        self.open.acquire()
        self.tokens += 1
        logits = torch.zeros(*tokens_BL.shape, 300)
        logits[..., 70] = 9.0
        return logits


def waited_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def started(port, statuses, client="127.0.0.1", body=LIKELIEST):
    """The thread of a client whose status is appended when it comes."""

    def work():
        statuses.append(ask(port, "/v1/completions", body, client=client)[0])

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_one_address_does_not_take_all_connections(trained, monkeypatch):
    gate, statuses = Gate(), []
    monkeypatch.setattr(RunView, "load", lambda *_: gate)
    for server in serving(trained, "client_connections=1"):
        port = server.address[1]
        first = started(port, statuses)
        waited_for(lambda: gate.entered)
        status, answer = ask(port, "/health", method="GET")
        assert (status, answer["error"]["code"]) == (503, "busy")
        assert ask(port, "/health", method="GET", client="127.0.0.2")[0] == 200
        gate.open.release(8)
        first.join()
    assert statuses == [200]


def test_a_server_of_this_machine_alone_has_all_connections_for_it(trained, monkeypatch):
    """Its clients have one address, as have those of a proxy here."""
    gate, statuses = Gate(), []
    monkeypatch.setattr(RunView, "load", lambda *_: gate)
    for server in serving(trained, "connections=9", "queue=8"):
        clients = [started(server.address[1], statuses) for _ in range(8)]
        waited_for(lambda there=server.server_state.connections: len(there) == 8)
        assert ask(server.address[1], "/health", method="GET")[0] == 200
        gate.open.release(100)
        for client in clients:
            client.join()
    assert statuses == [200] * 8


@pytest.fixture
def prepared(trained, monkeypatch):
    """A server whose model is at work, the prompts in the order in which they are prepared, and the
    semaphore that lets one be."""
    gate, prompts, turn = Gate(), [], threading.Semaphore(0)
    gate.open.release(1000)
    monkeypatch.setattr(RunView, "load", lambda *_: gate)
    for server in serving(trained, "queue=9"):
        question = server.service.question

        def waiting(prompt, question=question):
            prompts.append(prompt)
            turn.acquire()
            return question(prompt)

        object.__setattr__(server.service, "question", waiting)
        yield server, prompts, turn
        turn.release(1000)


def test_of_each_client_one_request_is_prepared_at_a_time(prepared):
    server, prompts, turn = prepared
    port, statuses, service = server.address[1], [], server.service
    threads = [started(port, statuses, body=LIKELIEST | {"prompt": "a"})]
    waited_for(lambda: prompts == ["a"])
    threads.append(started(port, statuses, body=LIKELIEST | {"prompt": "a, too"}))
    waited_for(lambda: service.turns["127.0.0.1"]._waiters)
    threads.append(started(port, statuses, "127.0.0.2", LIKELIEST | {"prompt": "b"}))
    waited_for(lambda: "127.0.0.2" in service.turns)
    turn.release(3)
    for thread in threads:
        thread.join()
    assert (prompts, statuses) == (["a", "b", "a, too"], [200] * 3)


def test_what_a_client_that_went_away_or_was_late_asked_for_is_not_prepared(prepared):
    server, prompts, turn = prepared
    raw = json.dumps(LIKELIEST | {"prompt": ["a", "b", "c"]}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    with socket.create_connection(server.address, timeout=60) as client:
        client.sendall(head.encode() + raw)
        waited_for(lambda: prompts == ["a"])
    waited_for(lambda: not server.service.turns)
    object.__setattr__(server.service, "seconds", 0.1)
    assert ask(server.address[1], "/v1/completions", LIKELIEST)[1]["error"]["code"] == "timeout"
    object.__setattr__(server.service, "seconds", 60)
    turn.release(9)
    assert ask(server.address[1], "/v1/completions", LIKELIEST | {"prompt": "d"})[0] == 200
    assert prompts == ["a", "d"]


def test_further_requests_than_may_wait_are_refused(trained, monkeypatch):
    gate = Gate()
    monkeypatch.setattr(RunView, "load", lambda *_: gate)
    for server in serving(trained):
        port, statuses = server.address[1], []

        def one(port=port, statuses=statuses):
            statuses.append(ask(port, "/v1/completions", LIKELIEST)[0])

        threads = [threading.Thread(target=one) for _ in range(3)]
        for number, thread in enumerate(threads):
            thread.start()
            scheduler = server.service.scheduler
            waited_for(lambda: gate.entered and len(scheduler._waiting) == number)  # noqa: B023
        assert ask(port, "/v1/completions", LIKELIEST)[0] == 429
        for _ in range(24):
            gate.open.release()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 3


def test_an_answer_that_takes_too_long_is_refused_and_the_next_one_comes(trained, monkeypatch):
    gate = Gate()
    monkeypatch.setattr(RunView, "load", lambda *_: gate)
    for server in serving(trained, "seconds=0.2"):
        port = server.address[1]
        status, answer = ask(port, "/v1/completions", LIKELIEST)
        assert (status, answer["error"]["code"]) == (503, "timeout")
        for _ in range(8):
            gate.open.release()
        object.__setattr__(server.service, "seconds", 60)
        for _ in range(8):
            gate.open.release()
        assert ask(port, "/v1/completions", LIKELIEST)[0] == 200
        assert gate.tokens < 16, "the first one was given up"


def test_a_client_that_goes_away_ends_its_answer(trained, monkeypatch):
    gate = Gate()
    monkeypatch.setattr(RunView, "load", lambda *_: gate)
    for server in serving(trained, "max_tokens=100000"):
        port = server.address[1]
        raw = json.dumps(LIKELIEST | {"max_tokens": 100_000, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n"
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + raw)
            gate.open.release()
            client.settimeout(60)
            received = b""
            while b"data" not in received:
                part = client.recv(1000)
                assert part, received
                received += part
        responses = []
        body = LIKELIEST | {"max_tokens": 1}
        second = threading.Thread(
            target=lambda: responses.append(ask(port, "/v1/completions", body))  # noqa: B023
        )
        second.start()
        end = time.monotonic() + 60
        while second.is_alive() and time.monotonic() < end:
            gate.open.release()
            time.sleep(0.01)
        assert responses[0][0] == 200
        assert gate.tokens < 100_000


def test_a_short_request_is_answered_while_a_longer_one_is_written(trained, monkeypatch):
    gate = Gate()
    monkeypatch.setattr(RunView, "load", lambda *_: gate)
    for server in serving(trained):
        port, responses = server.address[1], []
        bodies = [LIKELIEST | {"max_tokens": count} for count in (40, 2)]
        threads = [
            threading.Thread(
                target=lambda b=body: responses.append(ask(port, "/v1/completions", b))  # noqa: B023
            )
            for body in bodies
        ]
        threads[0].start()
        waited_for(lambda: gate.entered)
        threads[1].start()
        waited_for(lambda: server.service.scheduler._waiting)  # noqa: B023
        while threads[1].is_alive():
            gate.open.release()
            time.sleep(0.01)
        assert [body["usage"]["completion_tokens"] for _, body in responses] == [2]
        gate.open.release(100)
        threads[0].join()
        assert responses[1][1]["usage"]["completion_tokens"] == 40


def test_clients_that_wait_are_forgotten_when_they_leave_or_are_late(trained, monkeypatch):
    gate = Gate()
    monkeypatch.setattr(RunView, "load", lambda *_: gate)
    for server in serving(trained):
        port, waiting = server.address[1], server.service.scheduler._waiting
        first = threading.Thread(target=lambda: ask(port, "/v1/completions", LIKELIEST))  # noqa: B023
        first.start()
        waited_for(lambda: gate.entered)
        raw = json.dumps(LIKELIEST).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(head.encode() + raw)
            waited_for(lambda: len(waiting) == 1)  # noqa: B023
        waited_for(lambda: not waiting)  # noqa: B023
        object.__setattr__(server.service, "seconds", 0.3)
        assert ask(port, "/v1/completions", LIKELIEST)[1]["error"]["code"] == "timeout"
        assert not waiting
        gate.open.release(8)
        first.join()
