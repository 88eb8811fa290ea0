"""The HTTP application: OpenAI's paths, errors and event streams.

Invariant: whatever a client sends or leaves out, it costs bounded memory and time. Host and key are
checked before a body is read; bodies, the queue and answers have limits; a request is validated,
tokenised and its length checked before it reaches the decoding thread; and a client that goes away,
or is too late, cancels its request wherever it is.
"""

import asyncio
import hmac
import ipaddress
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forescale.ground.errors import UserError
from forescale.inference.generation import Answer
from forescale.inference.question import Question
from forescale.serving.form import Form
from forescale.serving.request import (
    CompletionRequest,
    Limits,
    Prompt,
    Refused,
    parse_json,
    parse_request,
    too_long,
)
from forescale.serving.scheduler import Event, Generation, Scheduler

_PAGE = "/"
# The page loads nothing, is in no frame of another site, and asks this server alone.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
_POLICY += (
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_PAGE_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
_LOGGED = 200  # characters of a path
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Service:
    """What is served. question: returns what the model reads of a prompt or a chat; answer: returns
    an empty answer to it, with its request and seed; hosts: names by which clients may reach this
    server beside localhost and the address of the connection, "*": any; key: what clients must
    show, None: nothing; chats: whether the model was trained on conversations; body: the most bytes
    of a request; seconds: the most until its answers are complete."""

    name: str
    scheduler: Scheduler
    question: Callable[[Prompt], Question]
    answer: Callable[[Question, CompletionRequest, int], Answer]
    limits: Limits
    body: int
    seconds: float
    hosts: Collection[str] = ()
    key: str | None = None
    chats: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    # One thread: tokenizers have a mode, see data/tokenizer.py.
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    # By the client's address: of one with many long requests only one is before those of others.
    turns: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    def answers(self, request: CompletionRequest, ended: threading.Event) -> list[Answer]:
        """Return the answers to a request, all empty. ended: set when nobody waits for them any
        more. Raises Refused."""
        answers: list[Answer] = []
        for prompt in request.prompts:
            if ended.is_set():
                break
            try:
                question = self.question(prompt)
            except UserError as e:
                raise Refused(400, f"The prompt {e.problem}; {e.todo}.", "prompt") from None
            if request.generation.echo and question.source is not None:
                raise Refused(400, "The prompt is a source, which no answer repeats.", "echo")
            tokens, context = len(question.source or question.start), question.max_context
            if tokens > context:
                raise too_long(f"{tokens:,}", context)
            for _ in range(request.samples):
                answers.append(self.answer(question, request, request.seed + len(answers)))
        return answers


def app_of(service: Service) -> Starlette:
    """Return the application of a service."""
    model = {"id": service.name, "object": "model", "created": service.created}
    model |= {"owned_by": "forescale", "chats": service.chats}
    page = (Path(__file__).parent / "chat.html").read_text()

    async def chat_page(request: Request) -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    def get(path: str, content: Any) -> Route:
        async def endpoint(request: Request) -> JSONResponse:
            return JSONResponse(content)

        return Route(path, endpoint)

    routes = [
        Route(_PAGE, chat_page),
        get("/health", {"status": "ok"}),
        get("/v1/models", {"object": "list", "data": [model]}),
        get(f"/v1/models/{service.name}", model),
        Route("/v1/completions", Completions(service, is_chat=False), methods=["POST"]),
        Route("/v1/chat/completions", Completions(service, is_chat=True), methods=["POST"]),
    ]

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"There is nothing at {request.method} {request.url.path[:_LOGGED]}."
        return _refusal(Refused(error.status_code, message, code="not_found"))

    middleware = [Middleware(Guard, service=service)]
    if service.key is not None:  # pages of other sites may ask, if they show the key
        names = ["authorization", "content-type"]
        cors = Middleware(
            CORSMiddleware, allow_origins=["*"], allow_methods=["GET", "POST"], allow_headers=names
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: not_found}
    )


def _refusal(refused: Refused) -> JSONResponse:
    headers = {"Connection": "close"} if refused.status == 411 else None  # reads no chunks
    return JSONResponse(refused.body(), refused.status, headers)


class Guard:
    """What comes before every endpoint: checks of the headers, errors as OpenAI has them, and one
    line a request on standard error."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on, or refuse it."""
        status = 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, send_noting)
        except Refused as e:
            await _refusal(e)(scope, receive, send_noting)
        except ClientDisconnect:
            pass
        client = (scope.get("client") or ("-",))[0]
        line = f"{scope['method']} {scope['raw_path'].decode('latin-1')[:_LOGGED]}"
        print(f'{client} "{line}" {status or "-"}', file=sys.stderr)

    def _check(self, scope: Scope) -> None:
        """Raise Refused for a host that isn't this server, or a wrong key."""
        headers = Headers(scope=scope)
        host = host_of(headers.get("host", ""))
        address = (scope.get("server") or ("",))[0]
        known = {*_LOCAL_HOSTS, address, *map(str.lower, self.service.hosts)}
        if host not in known and "*" not in known:  # a page of another site, by its own DNS
            message = f"This server is not {host!r}; start it with hosts=[{host}] if it is."
            raise Refused(403, message, code="unknown_host")
        if "transfer-encoding" in headers:  # a megabyte in chunks of a byte takes many seconds
            raise Refused(411, "The body needs a Content-Length, and no Transfer-Encoding.")
        if scope["path"] == _PAGE:  # it asks its reader for the key
            return
        key, prefix = self.service.key, "Bearer "
        shown_key = headers.get("authorization", "").removeprefix(prefix)
        if key is not None and not hmac.compare_digest(shown_key.encode(), key.encode()):
            raise Refused(401, "Incorrect API key.", code="invalid_api_key")


def host_of(header: str) -> str:
    """Return the host of a header Host in lower case: without its port, an address of IPv6 without
    its brackets."""
    host = header.strip().lower()
    name, _, port = host.rpartition(":")
    host = name if port.isdigit() and (name.endswith("]") or ":" not in name) else host
    with suppress(ValueError):
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    return host.removesuffix(".")


class Completions:
    """The endpoint that decodes: completions, or the next message of a chat."""

    def __init__(self, service: Service, is_chat: bool):
        self.service, self.is_chat = service, is_chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, until its client goes away."""
        service = self.service
        body = await _read_json(Request(scope, receive), service.body)
        request = parse_request(body, service.name, service.limits, self.is_chat)
        answering = asyncio.create_task(self._answer(request, scope, receive, send))

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        leaving = asyncio.create_task(gone())
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answering.done():
                answering.cancel()
        with suppress(asyncio.CancelledError):
            await answering

    async def _answer(
        self, request: CompletionRequest, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send the answers to a request. Raises Refused, unless a stream has begun."""
        service, form = self.service, Form(request, self.service.name)
        deadline = asyncio.get_running_loop().time() + service.seconds
        client = (scope.get("client") or ("",))[0]
        generation, events = await _submitted(service, request, deadline, client)
        try:
            pieces = _pieces(events, service.seconds, deadline)
            first = await anext(pieces, None)  # a request that is refused has no stream
            if request.is_stream:
                await form.stream(generation.answers, first, pieces, send)
                return
            async for _ in pieces:
                pass
        finally:
            service.scheduler.cancel(generation)
        await JSONResponse(form.whole(generation.answers))(scope, receive, send)


async def _read_json(request: Request, limit: int) -> Any:
    """Return the JSON body of a request. Raises Refused for more than `limit` bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # so that no page of a browser can send it without permission
        raise Refused(415, f"The body must be application/json, not {kind or 'of no type'}.")
    length = request.headers.get("content-length", "0")
    if len(length) > 15 or int(length) > limit:  # h11 has refused what is no number
        raise Refused(413, f"The body has more than {limit:,} bytes.", code="body_too_large")
    return parse_json(await request.body())


async def _submitted(
    service: Service, request: CompletionRequest, deadline: float, client: str
) -> tuple[Generation, asyncio.Queue[Event]]:
    """Tokenise a request and put it in the queue; return it with the queue of its events. Raises
    Refused."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def deliver(event: Event) -> None:
        with suppress(RuntimeError):  # the server has stopped
            loop.call_soon_threadsafe(events.put_nowait, event)

    service.scheduler.refuse_if_full()
    ended, turn = threading.Event(), service.turns.setdefault(client, asyncio.Lock())
    try:
        async with asyncio.timeout_at(deadline), turn:
            answers = await loop.run_in_executor(
                service.tokenizing, service.answers, request, ended
            )
    except TimeoutError:
        raise _too_late(service.seconds) from None
    finally:
        ended.set()
    generation = Generation(answers, deliver)
    service.scheduler.submit(generation)
    return generation, events


async def _pieces(
    events: asyncio.Queue[Event], seconds: float, deadline: float
) -> AsyncIterator[tuple[int, str]]:
    """Yield the pieces of a request's answers until all are complete. Raises Refused after the
    deadline, or if the model fails."""
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                event = await events.get()
        except TimeoutError:
            raise _too_late(seconds) from None
        if event is None:
            return
        if isinstance(event, Refused):
            raise event
        if isinstance(event, Exception):
            message = str(event) if isinstance(event, UserError) else "The model failed."
            raise Refused(500, message, code="failed") from event
        yield event


def _too_late(seconds: float) -> Refused:
    message = f"No complete answer within {seconds:g} s; ask for fewer tokens."
    return Refused(503, message, code="timeout")
