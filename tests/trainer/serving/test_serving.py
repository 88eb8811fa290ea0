"""`forescale serve`: OpenAI's paths and errors, limits that hold, and the official client."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from forescale import open_run
from forescale.config.compose import compose
from forescale.inference.view import RunView
from forescale.serving.server import Server
from forescale.verbs import serve

PROMPT = "def naïve("
LIKELIEST = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
SMALL = ["max_tokens=40", "batch=4", "queue=2", "connections=6", "body=4000", "seconds=60"]


def serving(trained, *words) -> Iterator[Server]:
    """A server of the run, at some port."""
    target = [f"target={trained.path.name}", f"run.root={trained.path.parent}"]
    server = serve.open_server(compose(serve.ServeJob, [*target, "port=0", *SMALL, *words]))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def port(trained):
    for server in serving(trained):
        yield server.address[1]


def ask(port, path, body=None, method="POST", client="127.0.0.1", **headers):
    """(status, body as JSON). client: its address"""
    connection = http.client.HTTPConnection("127.0.0.1", port, 60, (client, 0))
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    connection.request(method, path, raw, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content)


def streamed(port, path, body):
    """The events of a stream, without the last."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    raw = json.dumps(body | {"stream": True})
    connection.request("POST", path, raw, {"Content-Type": "application/json"})
    lines = [line for line in connection.getresponse().read().decode().split("\n\n") if line]
    connection.close()
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_the_text_that_generate_writes(port, trained, forescale):
    words = ("generate", trained.path, "num_tokens=8", "temperature=0")
    want = forescale(*words, f"prompt='{PROMPT}'")[1]
    status, answer = ask(port, "/v1/completions", LIKELIEST)
    (choice,) = answer["choices"]
    assert (status, PROMPT + choice["text"] + "\n") == (200, want)
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8
    events = streamed(port, "/v1/completions", LIKELIEST | {"stream_options": {"include_usage": 1}})
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_several_prompts_and_samples_are_numbered_and_repeat_with_their_seed(port):
    body = {"prompt": ["def ", "class Model"], "n": 2, "max_tokens": 6, "seed": 5}
    texts = [[c["text"] for c in ask(port, "/v1/completions", body)[1]["choices"]] for _ in "ab"]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    alone = ask(port, "/v1/completions", body | {"prompt": "class Model", "n": 1, "seed": 7})
    assert alone[1]["choices"][0]["text"] == texts[0][2]
    parts = {i: "" for i in range(4)}
    for event in streamed(port, "/v1/completions", body):
        for choice in event["choices"]:
            parts[choice["index"]] += choice["text"]
    assert [*parts.values()] == texts[0]


def test_a_chat_is_continued_from_its_template(port, trained, tmp_path):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    likeliest = {"max_tokens": 6, "temperature": 0}
    chat = ask(port, "/v1/chat/completions", {"messages": messages, **likeliest})[1]
    prompt = "System:\na\n\nUser:\nb\n\nAssistant:\n"  # as `finetune` trains
    plain = ask(port, "/v1/completions", {"prompt": prompt, **likeliest})[1]
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    events = streamed(port, "/v1/chat/completions", {"messages": messages, **likeliest})
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(d.get("content", "") for d in deltas) == plain["choices"][0]["text"]
    path = tmp_path / "tokenizer_config.json"
    template = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}{{ eos_token }}"
    path.write_text(json.dumps({"chat_template": template}))
    for server in serving(trained, f"template={path}"):
        templated = server.address[1]
        answer = ask(templated, "/v1/chat/completions", {"messages": messages, **likeliest})[1]
        tokenizer = open_run(trained.path).tokenizer  # to it a special token is one
        want = tokenizer.encode("<system>a<user>b<|endoftext|>").ids
        assert answer["usage"]["prompt_tokens"] == len(want)
        messages[1]["content"] = "b<|endoftext|>"
        status, answer = ask(templated, "/v1/chat/completions", {"messages": messages})
        assert (status, answer["error"]["param"]) == (400, "messages")
        assert "with a special token in a message" in answer["error"]["message"]


def test_a_template_that_is_none_is_refused(trained, forescale, tmp_path):
    for name, text, message in (
        ("a.json", "{}", "has no chat_template"),
        ("b.json", "{", "not valid JSON"),
        ("c.jinja", "{% for", "this chat template can't be read"),
    ):
        path = tmp_path / name
        path.write_text(text)
        assert message in forescale.refuses("serve", trained.path, f"template={path}", "port=0")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not valid JSON"),
        (b'{"prompt": "\\ud800"}', 400, "not valid JSON"),
        (b'{"prompt": "\xff"}', 400, "not valid JSON"),
        (b'{"temperature": NaN}', 400, "not valid JSON"),
        (b"[" * 3000, 400, "not valid JSON"),
        ([], 400, "must be a JSON object"),
        ({"prompt": 3}, 400, "`prompt` must be"),
        ({"max_tokens": 41}, 400, "'max_tokens' must be a whole number from 1 to 40"),
        ({"n": 5}, 400, "'n' must be"),
        ({"prompt": ["a"] * 5}, 400, "5 answers; at most 4"),
        ({"temperature": "hot"}, 400, "'temperature' must be a number"),
        ({"stop": ""}, 400, "`stop` must be"),
        ({"stream": "yes"}, 400, "'stream' must be true or false"),
        ({"logit_bias": {"5": 1}}, 400, "does not support 'logit_bias'"),
        ({"promt": "a"}, 400, "Unknown parameter: 'promt'"),
        ({"model": "gpt"}, 404, "does not exist; this server has 'small'"),
        ({"prompt": "import sys " * 40}, 400, "tokens, and the model reads 32"),
        ({"prompt": "a" * 4000}, 413, "more than 4,000 bytes"),
    ],
)
def test_what_is_refused_has_the_form_of_openai_s_errors(port, body, status, message):
    response = ask(port, "/v1/completions", body)
    assert response[0] == status
    assert message in response[1]["error"]["message"]
    assert response[1]["error"].keys() == {"message", "type", "param", "code"}


def test_only_known_paths_kinds_and_lengths_are_taken(port):
    assert ask(port, "/v1/models", method="GET")[1]["data"][0]["id"] == "small"
    assert ask(port, "/v1/models/small", method="GET")[1]["id"] == "small"
    assert ask(port, "/health", method="GET")[0] == 200
    assert ask(port, "/v1/none", method="GET")[0] == 404
    assert ask(port, "/v1/none", {})[0] == 404
    assert ask(port, "/v1/completions", LIKELIEST, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(port, "/v1/chat/completions", {"messages": [{"role": "x"}]})[0] == 400


def exchange(port, head: str, body: bytes = b"") -> bytes:
    """What the server sends, until it has sent a whole answer or closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return client.recv(1000)


def test_a_body_is_bounded_however_its_length_is_given(port):
    head = "POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
    chunked = head + "Transfer-Encoding: chunked"
    assert b" 411 " in exchange(port, chunked, b"1\r\n{\r\n")
    assert b" 411 " in exchange(port, f"{chunked}\nContent-Length: 5", b"0\r\n\r\n")
    assert b" 413 " in exchange(port, head + "Content-Length: 4001")  # of which nothing comes
    assert b" 400 " in exchange(port, head + "A: b\n" * 20_000)
    assert b" 400 " in exchange(port, head + "Content-Length: 5_0")
    assert b" 400 " in exchange(port, head + "Content-Length: 5\nContent-Length: 6", b"{}    ")


def test_only_this_machine_is_answered_unless_hosts_names_others(port, trained):
    hosts = {"localhost": 200, "LOCALHOST:8000": 200, "[::1]:80": 200, "127.0.0.1": 200}
    hosts |= {"evil.example": 403, "evil.example:8000": 403, "": 403, "localhost.evil.example": 403}
    for host, status in hosts.items():
        assert ask(port, "/health", method="GET", Host=host)[0] == status, host
    for server in serving(trained, "hosts=[node7.cluster]"):
        for host, status in {"Node7.cluster:8000": 200, "node8.cluster": 403}.items():
            assert ask(server.address[1], "/health", method="GET", Host=host)[0] == status


def test_a_key_is_checked_before_the_body_is_read(trained, monkeypatch):
    monkeypatch.setenv(serve.KEY, "sesame")
    for server in serving(trained):
        port = server.address[1]
        assert ask(port, "/v1/models", method="GET")[0] == 401
        assert ask(port, "/v1/models", method="GET", Authorization="Bearer sesame")[0] == 200
        head = "POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Length: 3000"
        assert b" 401 " in exchange(port, head)  # of the body nothing has come


def test_slow_and_too_many_clients_are_left(trained, monkeypatch):
    monkeypatch.setattr("forescale.serving.server._DEADLINE", 0.3)
    for server in serving(trained, "connections=2"):
        port = server.address[1]
        for start in (b"", b"POST /v1/comp", b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
                client.sendall(start)
                while client.recv(1000):
                    pass  # the server ends the connection
        monkeypatch.setattr("forescale.serving.server._DEADLINE", 60)
        clients = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(5)]
        assert ask(port, "/health", method="GET")[0] == 200  # not kept out by those that are slow
        assert [client.recv(1000) for client in clients[:4]] == [b""] * 4, "the oldest have ended"
        for client in clients:
            client.close()


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


def test_a_text_that_is_too_long_is_refused_before_it_is_tokenised(port, monkeypatch):
    monkeypatch.setattr(
        "forescale.inference.question.text_ids", lambda *_: pytest.fail("tokenised")
    )
    monkeypatch.setattr(
        "forescale.inference.question.chat_ids", lambda *_: pytest.fail("tokenised")
    )
    messages = [{"role": "user", "content": "a" * 3000}]
    for path, body in (
        ("/v1/completions", {"prompt": "a" * 3000}),
        ("/v1/chat/completions", {"messages": messages}),
    ):
        status, answer = ask(port, path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "at least" in answer["error"]["message"]


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


def test_openai_s_own_client_is_served(port):
    openai = pytest.importorskip("openai", reason="needs pip install openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
    (model,) = client.models.list().data
    how = dict(model=model.id, max_tokens=8, temperature=0)
    whole = client.completions.create(prompt=PROMPT, **how)
    parts = client.completions.create(prompt=PROMPT, stream=True, **how)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text != ""
    messages = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(messages=messages, **how)
    usage = {"stream_options": {"include_usage": True}, "stream": True}
    parts = [*client.chat.completions.create(messages=messages, **how, **usage)]
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == chat.choices[0].message.content
    assert parts[-1].usage == chat.usage
    with pytest.raises(openai.BadRequestError, match="'max_tokens' must be"):
        client.completions.create(prompt=PROMPT, **how | {"max_tokens": 9999})
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(prompt=PROMPT, **how | {"model": "gpt"})


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


def test_clients_at_once_get_the_answers_that_each_gets_alone(port):
    """Two may wait. Where all three come before the first is taken, one gets code 429 and tries
    again, as clients do."""
    openai = pytest.importorskip("openai", reason="needs pip install openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=9)
    prompts = ("def ", "class Model:", "import os, ", "    return x")

    def text(number: int) -> str:
        how = dict(max_tokens=6 + 5 * number, temperature=0.9 * (number % 2), seed=number)
        completion = client.completions.create(model="small", prompt=prompts[number], **how)
        return completion.choices[0].text

    alone = [text(number) for number in range(2)]
    texts: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: texts.update({i: text(i % 2)})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[i] for i in range(3)] == [*alone, alone[0]]


def test_clients_that_wait_are_forgotten_when_they_leave_or_are_late(trained, monkeypatch):
    gate = Gate()
    monkeypatch.setattr(RunView, "load", lambda *_: gate)
    for server in serving(trained, "seconds=5"):
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
        assert ask(port, "/v1/completions", LIKELIEST)[1]["error"]["code"] == "timeout"
        assert not waiting
        gate.open.release(8)
        first.join()


def test_the_server_stops_on_a_signal_and_ends_open_requests(trained):
    words = [sys.executable, "-m", "forescale", "serve", trained.path, "port=0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline().partition("127.0.0.1:")[2].partition("/")[0])
        assert ask(port, "/health", method="GET")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "Stopped.\n"
    assert process.returncode == 0
