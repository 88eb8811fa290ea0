"""Servers of a run, and requests to them."""

import http.client
import json
import threading
from collections.abc import Iterator

from forescale.config.compose import compose
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
