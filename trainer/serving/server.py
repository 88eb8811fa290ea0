"""The HTTP side, with Python's own server: OpenAI's paths, errors and event streams.

Invariant: whatever a client sends or leaves out, it costs bounded memory and time: bodies,
connections, the queue and waiting have limits, and a client that goes away ends its answers.
"""

import hmac
import json
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from forescale.errors import UserError
from forescale.inference.answering import Question
from forescale.inference.writing import Answer
from forescale.serving.asked import Asked, Limits, Messages, Refused, asked
from forescale.serving.desk import Desk, Ticket

_IDLE = 30.0  # seconds in which a client must send, or take, the next bytes
_LEFT = 4 << 20  # bytes that are read of a body that is refused, so that its client reads why


@dataclass(frozen=True)
class Service:
    """What is served. begin: makes the answer to a prompt, with how it is wanted and its seed;
    question: what the model reads of a prompt or chat; key: what a client must show; None: nothing.
    body: the most bytes of a request; seconds: the most until an answer is complete; connections:
    at once."""

    name: str
    desk: Desk
    begin: Callable[[Question, Asked, int], Answer]
    question: Callable[[str | Messages], Question]
    limits: Limits
    body: int
    seconds: float
    connections: int
    key: str | None = None
    created: int = 0

    def answers(self, wish: Asked) -> list[Answer]:
        """Return the answers of a request, none begun. Raises Refused."""
        found: list[Answer] = []
        for prompt in wish.prompts:
            try:
                question = self.question(prompt)
            except UserError as e:
                raise Refused(400, f"The prompt {e.problem}; {e.todo}.", "prompt") from None
            tokens, most = len(question.source or question.start), question.max_context
            if tokens > most:
                message = f"The prompt has {tokens:,} tokens, and the model reads {most:,}."
                raise Refused(400, message, "prompt", "context_length_exceeded")
            for _ in range(wish.samples):
                found.append(self.begin(question, wish, wish.seed + len(found)))
        return found


class Server(ThreadingHTTPServer):
    """Listens, and answers each connection in a thread. Raises OSError if the port is taken."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], service: Service):
        self.service = service
        self._places = threading.BoundedSemaphore(service.connections)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread, or refuse it where there are too many."""
        if not self._places.acquire(blocking=False):
            request.settimeout(1)
            with suppress(OSError):
                request.sendall(_busy())
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the requests of one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no fault."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _busy() -> bytes:
    raw = json.dumps(Refused(503, "Too many connections.", code="busy").body()).encode()
    head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "forescale", ""
    timeout = _IDLE

    def do_GET(self) -> None:
        """List the model, or say that the server is there."""
        self._guarded(self._get)

    def do_POST(self) -> None:
        """Write a completion, or the next message of a chat."""
        self._guarded(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """One line a request on standard error."""
        print(f"{self.address_string()} {format % args}", file=sys.stderr)

    def _guarded(self, answer: Callable[[], None]) -> None:
        try:
            self._authorise()
            answer()
        except Refused as e:
            self._send(e.status, e.body())
            if self.close_connection:
                self._read_on()

    def _read_on(self) -> None:
        """Read what the client still sends: a connection that is closed before takes the answer
        with it."""
        self.connection.settimeout(1)
        end, left = time.monotonic() + 2, _LEFT
        with suppress(OSError):
            while left > 0 and time.monotonic() < end and (part := self.rfile.read1(1 << 16)):
                left -= len(part)

    def _authorise(self) -> None:
        key = self.server.service.key
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            self.close_connection = True  # its body isn't read
            raise Refused(401, "Incorrect API key.", code="invalid_api_key")

    def _get(self) -> None:
        service, path = self.server.service, self.path.partition("?")[0].rstrip("/")
        model = {"id": service.name, "object": "model", "created": service.created}
        model["owned_by"] = "forescale"
        if path == "/health":
            self._send(200, {"status": "ok"})
        elif path == "/v1/models":
            self._send(200, {"object": "list", "data": [model]})
        elif path == f"/v1/models/{service.name}":
            self._send(200, model)
        else:
            raise Refused(404, f"There is nothing at GET {path}.", code="not_found")

    def _post(self) -> None:
        service, path = self.server.service, self.path.partition("?")[0].rstrip("/")
        body = self._body()
        if path not in ("/v1/completions", "/v1/chat/completions"):
            raise Refused(404, f"There is nothing at POST {path}.", code="not_found")
        wish = asked(body, service.name, service.limits, path == "/v1/chat/completions")
        count = wish.samples * len(wish.prompts)
        ticket = Ticket(count, lambda: service.answers(wish))
        service.desk.submit(ticket)
        try:
            self._reply(wish, ticket, _Form(wish, service.name))
        except OSError:  # the client has gone
            self.close_connection = True
        finally:
            ticket.cancel()

    def _body(self) -> Any:
        """Return the JSON of a request. Raises Refused, and the connection then ends, as what comes
        next on it may be the rest of the body."""
        most, length = self.server.service.body, self.headers.get("Content-Length", "")
        was, self.close_connection = self.close_connection, True
        kind = self.headers.get_content_type()
        if kind != "application/json":  # so that no page of a browser can ask without being let
            raise Refused(415, f"The body must be application/json, not {kind}.")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "The request must say its Content-Length.")
        if len(length) > 15 or int(length) > most:
            raise Refused(413, f"The body has more than {most:,} bytes.", code="body_too_large")
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise Refused(400, "The body ends too early.")
        self.close_connection = was
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise Refused(400, "The body is no JSON.") from None

    def _reply(self, wish: Asked, ticket: Ticket, form: "_Form") -> None:
        events = _events(ticket, self.server.service.seconds)
        first = next(events, None)  # a request that is refused has no stream
        if not wish.streams:
            for _ in events:
                pass
            self._send(200, form.whole(ticket.answers))
            return
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for number in range(len(ticket.answers) if wish.is_chat else 0):
                self._event(form.part(number, None))
            while first is not None:
                number, piece = first
                if piece:
                    self._event(form.part(number, piece))
                first = next(events, None)
            for number, answer in enumerate(ticket.answers):
                self._event(form.part(number, "", answer))
            if wish.counts:
                self._event(form.usage(ticket.answers))
        except Refused as e:
            self._event(e.body())
            return
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, facts: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(facts, ensure_ascii=False)}\n\n".encode())

    def _send(self, status: int, facts: dict[str, Any]) -> None:
        raw = json.dumps(facts, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(raw)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(raw)


def _events(ticket: Ticket, seconds: float) -> Iterator[tuple[int, str]]:
    """Yield the pieces of a request's answers until all are complete. Raises Refused if that takes
    longer, or they can't be written."""
    end = time.monotonic() + seconds
    while True:
        try:
            event = ticket.events.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            message = f"No complete answer within {seconds:g} s; ask for fewer tokens."
            raise Refused(503, message, code="timeout") from None
        if event is None:
            return
        if isinstance(event, Refused):
            raise event
        if isinstance(event, Exception):
            message = str(event) if isinstance(event, UserError) else "The model failed."
            raise Refused(500, message, code="failed") from event
        yield event


class _Form:
    """The objects of an answer: whole, or in parts."""

    def __init__(self, wish: Asked, name: str):
        self.is_chat, self.counts = wish.is_chat, wish.counts
        kind = "chat.completion" if wish.is_chat else "text_completion"
        self.id = f"{'chatcmpl' if wish.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.head = {"id": self.id, "created": int(time.time()), "model": name}
        self.kind, self.part_kind = kind, kind + (".chunk" if wish.is_chat else "")

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """Return the complete answer."""
        choices = []
        for number, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            text = {"message": message} if self.is_chat else {"text": answer.text}
            choices.append(_choice(number, text, _reason(answer)))
        return {**self.head, "object": self.kind, "choices": choices, "usage": _usage(answers)}

    def part(self, number: int, piece: str | None, ended: Answer | None = None) -> dict[str, Any]:
        """Return the part that brings a piece of an answer; None begins it, and `ended` ends it."""
        delta = {"role": "assistant", "content": ""} if piece is None else {"content": piece}
        delta = {} if ended is not None else delta
        text = {"delta": delta} if self.is_chat else {"text": piece or ""}
        choices = [_choice(number, text, None if ended is None else _reason(ended))]
        more = {"usage": None} if self.counts else {}
        return {**self.head, "object": self.part_kind, "choices": choices, **more}

    def usage(self, answers: list[Answer]) -> dict[str, Any]:
        """Return the last part of a stream that counts."""
        usage = _usage(answers)
        return {**self.head, "object": self.part_kind, "choices": [], "usage": usage}


def _choice(number: int, text: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": number, **text, "logprobs": None, "finish_reason": reason}


def _reason(answer: Answer) -> str:
    return "length" if answer.reason == "length" else "stop"


def _usage(answers: list[Answer]) -> dict[str, int]:
    # Answers to one prompt share their question.
    questions = {id(answer.question): answer.question for answer in answers}.values()
    read = sum(len(question.source or question.start) for question in questions)
    written = sum(answer.num_tokens for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
