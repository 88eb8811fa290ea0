"""`forescale serve`: OpenAI's paths and errors, limits that hold, and the official client."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch

from forescale import open_run
from forescale.verbs import serve
from tests.trainer.serving.client import LIKELIEST, PROMPT, ask, serving


@pytest.fixture(scope="module")
def port(trained):
    for server in serving(trained):
        yield server.address[1]


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


def test_log_probabilities_are_those_of_the_model_alone(port, trained):
    """Whatever the temperature, and whether a prompt is given as a text or as its ids."""
    view = open_run(trained.path)
    ids, how = view.tokenizer.encode(PROMPT).ids, {"logprobs": 3, "echo": True, "seed": 1}
    echoed = ask(port, "/v1/completions", {"prompt": ids, **how, "max_tokens": 0})[1]
    numbers = echoed["choices"][0]["logprobs"]
    with torch.no_grad():
        logs = view.model()(torch.tensor([ids]))[0].float().log_softmax(-1)
    want = logs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert numbers["token_logprobs"] == [None, *(pytest.approx(x, abs=1e-4) for x in want)]
    tops = [max(place.values()) for place in numbers["top_logprobs"][1:]]
    assert tops == pytest.approx(logs[:-1].amax(-1).tolist(), abs=1e-4)
    assert echoed["choices"][0]["text"] == PROMPT
    body = {"prompt": PROMPT, **how, "max_tokens": 4, "temperature": 2.0}
    (choice,) = ask(port, "/v1/completions", body)[1]["choices"]
    text, numbers = choice["text"], choice["logprobs"]
    assert text.startswith(PROMPT)
    assert len(numbers["tokens"]) == len(ids) + 4
    assert numbers["token_logprobs"][1 : len(ids)] == pytest.approx(want, abs=1e-4)
    assert numbers["token_logprobs"][len(ids)] <= max(numbers["top_logprobs"][len(ids)].values())
    assert max(numbers["top_logprobs"][len(ids)].values()) == pytest.approx(
        float(logs[-1].max()), abs=1e-4
    )
    assert numbers["text_offset"][len(ids)] == len(PROMPT)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "seed": 1}
    body |= {"logprobs": True, "top_logprobs": 2}
    whole = ask(port, "/v1/chat/completions", body)[1]["choices"][0]
    places = whole["logprobs"]["content"]
    assert [len(place["top_logprobs"]) for place in places] == [2, 2, 2]
    events = streamed(port, "/v1/chat/completions", body)
    parts = [event["choices"][0]["logprobs"] for event in events]
    assert [place for part in parts if part for place in part["content"]] == places


def test_the_evaluation_harness_scores_through_the_server(port, trained):
    """By the client that lm-evaluation-harness has for servers, which sends token ids."""
    client = pytest.importorskip("lm_eval.models.openai_completions", reason="needs lm_eval")
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    url = f"http://127.0.0.1:{port}/v1/completions"
    how = dict(model="small", tokenizer_backend=None, max_length=32, num_concurrent=1)
    api = client.LocalCompletionsAPI(base_url=url, batch_size=2, **how)
    tokenizer = open_run(trained.path).tokenizer
    api.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    api.tokenizer_backend = "huggingface"  # which else reads a directory with an exported tokenizer
    rows = [([5, 6, 7], [8, 9]), ([10, 11], [12])]
    scores = api._loglikelihood_tokens([((str(i), ""), *row) for i, row in enumerate(rows)])
    model = open_run(trained.path).model()
    for (start, rest), (total, is_greedy) in zip(rows, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([start + rest]))[0, len(start) - 1 : -1].float()
        want = logits.log_softmax(-1).gather(1, torch.tensor(rest)[:, None]).sum()
        assert total == pytest.approx(float(want), abs=1e-4)
        assert is_greedy == (logits.argmax(-1).tolist() == rest)


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
        ({"prompt": [3, "a"]}, 400, "`prompt` must be"),
        ({"prompt": [3, 99999]}, 400, "has the token id 99999"),
        ({"prompt": "a", "logprobs": 21}, 400, "'logprobs' must be"),
        ({"prompt": "a", "max_tokens": 0}, 400, "'max_tokens' must be"),
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


def test_pages_of_other_sites_may_ask_only_where_a_key_is_needed(port, trained, monkeypatch):
    site = {"Origin": "https://other.site", "Access-Control-Request-Method": "POST"}

    def allowed(at):
        connection = http.client.HTTPConnection("127.0.0.1", at, timeout=60)
        connection.request("OPTIONS", "/v1/completions", headers=site)
        return connection.getresponse().getheader("Access-Control-Allow-Origin")

    assert allowed(port) is None
    monkeypatch.setenv("FORESCALE_API_KEY", "k")
    for server in serving(trained):
        assert allowed(server.address[1]) == "*"
        assert ask(server.address[1], "/v1/models", method="GET")[0] == 401


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


def test_the_server_stops_on_a_signal_and_ends_open_requests(trained):
    words = [sys.executable, "-m", "forescale", "serve", trained.path, "port=0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline().partition("127.0.0.1:")[2].partition("/")[0])
        assert ask(port, "/health", method="GET")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read().endswith("Stopped.\n")
    assert process.returncode == 0
