"""`forescale serve`: a trained model behind HTTP, as OpenAI's clients expect it."""

import os
import signal
import sys
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from forescale.config.compose import parse
from forescale.config.job import ModelJob
from forescale.config.schema import key
from forescale.data.conversations.template import PLAIN, Unfit
from forescale.data.tokenizer import longest_token
from forescale.ground.document import tell_line
from forescale.ground.errors import DONE, UserError
from forescale.ground.rendezvous import is_loopback
from forescale.inference.view import open_view, ready_to_write
from forescale.run.finetune import chat_template, kept_template, vocabulary_of_run

if TYPE_CHECKING:
    from forescale.inference.question import Question
    from forescale.serving.request import Prompt
    from forescale.serving.server import Server

KEY = "FORESCALE_API_KEY"  # environment variable: what clients must show


@dataclass
class ServeJob(ModelJob):
    """A checkpoint, an address, and limits."""

    VERB: ClassVar[str] = "serve"
    FLAGS: ClassVar = {"--open": "open"}
    PRINTS: ClassVar = {"name": str, "url": str}
    LINES: ClassVar[str] = "one, when it listens"

    host: str = "127.0.0.1"  # address to listen at; 0.0.0.0: all of this machine
    port: int = key(8000, ge=0, le=65535)  # port to listen at; 0: any that is free
    # names by which clients may reach this server, beside localhost and its address; *: any
    hosts: list[str] = key([])
    # chat template, a file in Jinja or a tokenizer_config.json; null: that of the run or its
    # tokenizer, else the plain one of forescale finetune
    template: str | None = None
    open: bool = False  # open its page, a chat, in a browser; --open does the same
    max_tokens: int = key(1024, ge=1)  # the most tokens of an answer
    # products of large matrices in 8 bits: answers are faster on a CPU, and less exact
    int8: bool = False
    batch: int = key(16, ge=1)  # the most answers that are decoded at once, and of one request
    queue: int = key(64, ge=1)  # requests that may wait; further ones get error 429
    connections: int = key(128, ge=1)  # connections at once; further ones get error 503
    # of them from one address; null: a quarter, at least 8, and all if host is this machine alone
    client_connections: int | None = key(None, ge=1)
    body: int = key(1 << 20, ge=1)  # the most bytes of a request
    seconds: float = key(300.0, gt=0)  # the most seconds that a request may take


JOB = ServeJob
EXAMPLES = (
    "serve first",
    "serve first --open",
    "serve first port=8080 max_tokens=256",
    "serve first template=tokenizer_config.json",
)


def main(arguments: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; say on stdout where."""
    job = parse(ServeJob, arguments)
    print(f"Loading {job.target} ...", file=sys.stderr, flush=True)
    server = open_server(job)
    host, port = server.address
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    tell_line({"name": server.service.name, "url": f"http://{address}/v1"})
    print(f"Serving {server.service.name} at http://{address}/v1 (Ctrl-C ends it).")
    print(f"A page to chat with it: http://{address}/")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if job.open:  # the browser's request waits until the loop below takes it: the socket listens
        webbrowser.open(f"http://{address}/")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("Stopped.")
    return DONE


def open_server(job: ServeJob) -> "Server":
    """Return the server of a job, which listens. Raises UserError."""
    from forescale.inference.generation import Answer
    from forescale.inference.question import chat_question, question_of, question_of_ids
    from forescale.serving.app import Service
    from forescale.serving.request import Limits, Refused, too_long
    from forescale.serving.scheduler import Scheduler
    from forescale.serving.server import Server

    view = open_view(job.target or "", job.run.root)
    template = chat_template(view.run, vocabulary_of_run(view.run), job.template)
    with suppress(Unfit):  # a chat of one message may not fit; a template that isn't one is refused
        template.prompt([{"role": "user", "content": "a"}])
    model = ready_to_write(view.load(view.checkpoint(job.step), job.trust), job.int8)

    most = view.config.train.sequence_length
    longest = longest_token(view.tokenizer) if view.config.continues_text else None

    def check(text: str) -> None:
        """Refuse a text that is too long however it is tokenised, which takes time."""
        if longest and (fewest := -(-len(text.encode()) // longest)) > most:
            raise too_long(f"at least {fewest:,}", most)

    def question(prompt: "Prompt") -> "Question":
        """Return a prompt or a chat as the model reads it. Raises Refused, and UserError."""
        if isinstance(prompt, tuple):
            return question_of_ids(view, prompt)
        if isinstance(prompt, str):
            check(prompt)
            return question_of(view, prompt)
        try:
            return chat_question(view, template, prompt, check)
        except Unfit as e:
            raise Refused(400, f"A chat {e}.", "messages") from None
        except UserError as e:
            if e.where != template.where:
                raise
            raise Refused(400, f"The chat is not answered: {e.problem}.", "messages") from None

    service = Service(
        name=view.name,
        scheduler=Scheduler(model, job.batch, job.queue),
        question=question,
        answer=lambda question, request, seed: Answer(
            view.tokenizer, question, request.generation, seed
        ),
        limits=Limits(job.max_tokens, job.batch),
        body=job.body,
        seconds=job.seconds,
        hosts=job.hosts,
        key=os.environ.get(KEY) or None,
        chats=kept_template(view.run) is not None or template.source != PLAIN,
    )
    others = max(8, job.connections // 4)
    each = job.client_connections or (job.connections if is_loopback(job.host) else others)
    try:
        return Server(job.host, job.port, service, job.connections, each)
    except OSError as e:
        problem = f"can't listen at {job.host}:{job.port} ({e.strerror or e})"
        raise UserError("port", problem, "choose another port or host") from None
