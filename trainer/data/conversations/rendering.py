"""A conversation divided into pieces by a chat template, in a process of its own.

Invariant: the pieces are those of a rendering of each beginning of the conversation, whatever the
template looks at. Whatever it does (it may come from a download), Jinja's sandbox gives it no files
and no objects, its process ends after some seconds of a processor, or at _MEMORY bytes, and the
caller gets a sentence.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_GROWTH, _SPARE = 16, 1 << 10  # times the bytes of messages, and of each so many more
_REASON = 300  # characters of a template's own message
# Of a processor, for a conversation: of training, for each 1,000 messages, and of one whose client
# waits for an answer.
_SECONDS, _PROMPT_SECONDS = 10.0, 3.0
_MEMORY = 1 << 30  # bytes of address space
_BOOT = "from forescale.data.conversations.rendering import serve; serve()"

Message = Mapping[str, str]  # role and content


class Unfit(Exception):
    """A conversation that can't be used; the text says why, as a reason to count."""


class Broken(Exception):
    """A template that can't be read, or goes beyond the limits of its process; the text says why.
    Conversations are not left out for it: which ones would depend on the machine."""


class Piece(NamedTuple):
    """A part of a conversation. learned: whether it is a response."""

    text: str
    learned: bool


class Refusal(TemplateError):
    """The template's own raise_exception."""


def _unfit(error: Exception) -> Unfit:
    if isinstance(error, TemplateError):
        return Unfit(f"that the chat template refuses ({_message_of(error)})")
    kind = type(error).__name__  # a mistake of a template may be any, such as 1 / 0
    return Unfit(f"with which the chat template fails ({kind}: {_message_of(error)})")


def _message_of(error: Exception) -> str:
    """Return an error's message, short and without control characters: it may be the template's."""
    return "".join(c if c.isprintable() else " " for c in str(error)[:_REASON])


class Division:
    """Divides conversations by a template; see Renderer, and ChatTemplate for the arguments."""

    def __init__(self, source: str, special: Sequence[str], tokens: Mapping[str, str]):
        self.source, self.special, self.tokens = source, special, tokens
        self._most = 0  # bytes of a text

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the turns so far and the rest of the prompt; one part where the template writes a
        turn in another way once others follow."""
        self._begin(messages)
        whole = self._rendered(messages, True)
        try:
            turns = self.turns(messages)
        except Unfit:
            return [Piece(whole, False)]
        done = "".join(piece.text for piece in turns)
        if not whole.startswith(done):
            return [Piece(whole, False)]
        return [*turns, Piece(whole[len(done) :], False)]

    def turns(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the parts up to the last response, read and learned in turn. Renders up to each
        response, which takes quadratic time: 1,000 messages take about a second."""
        self._begin(messages)
        turns, done = list[Piece](), ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:i], True)
            after = self._rendered(messages[: i + 1], False)
            if not (before.startswith(done) and after.startswith(before)):
                raise Unfit("of which the chat template writes a turn in two ways")
            response = after[len(before) :]
            ends = [response.rfind(s) + len(s) for s in self.special if s in response]
            response = response[: max(ends)] if ends else response
            turns += [Piece(before[len(done) :], False), Piece(response, True)]
            done = before + response
        return turns

    def _begin(self, messages: Sequence[Message]) -> None:
        """Set the limit of texts. Raises Unfit where a message spells a special token: it would
        become that token, and a user could end a turn, or write one of the assistant's."""
        self._most = _GROWTH * sum(len(m["content"]) + _SPARE for m in messages)
        if any(token in message["content"] for token in self.special for message in messages):
            raise Unfit("with a special token in a message")

    def _rendered(self, messages: Sequence[Message], is_prompt: bool) -> str:
        template = self._template
        names = {**self.tokens, "messages": messages, "add_generation_prompt": is_prompt}
        texts, size = list[str](), 0
        try:
            for text in template.generate(names):
                texts.append(text)
                size += len(text.encode())  # fails for half a character, which no tokenizer reads
                if size > self._most:
                    problem = f"of which the chat template writes over {_GROWTH} times the text"
                    raise Unfit(problem)
        except (Unfit, MemoryError):
            raise
        except Exception as e:
            raise _unfit(e) from e
        return "".join(texts)

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )

        def as_json(value: Any, indent: int | None = None, **_: Any) -> str:
            # Unlike Jinja's own filter, which escapes for HTML.
            return json.dumps(value, ensure_ascii=False, indent=indent)

        def refuse(message: str) -> None:
            raise Refusal(message)

        environment.filters["tojson"] = as_json
        environment.globals["raise_exception"] = refuse
        return environment

    @cached_property
    def _template(self) -> Template:
        try:
            return self._environment.from_string(self.source)
        except MemoryError:
            raise
        except Exception as e:  # also of Python's compiler, as for 200 nested brackets
            raise Broken(f"can't be read ({_message_of(e)})") from e


class Renderer:
    """The process of a template. source, special, tokens: see ChatTemplate."""

    def __init__(self, source: str, special: Sequence[str], tokens: Mapping[str, str]):
        self._job = source, special, tokens
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], Any] = lambda: None

    def pieces(
        self, conversations: Sequence[Sequence[Message]], is_prompt: bool
    ) -> list[list[Piece] | Unfit]:
        """Return the pieces of each conversation, or why it has none. is_prompt: up to where the
        model writes the next response, else up to the last one. Raises Broken."""
        try:
            if self._process is None:
                self._process = self._started()
                self._send(self._job)
            limits = [seconds_for(len(messages), is_prompt) for messages in conversations]
            self._send((is_prompt, limits, conversations))
            return [self._answer(len(m), s) for m, s in zip(conversations, limits, strict=True)]
        except BaseException:  # also Ctrl-C: no later call may read the rest of these answers
            self._end()
            self._process = None
            raise

    def _started(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C reaches only the parent
        )
        self._end = weakref.finalize(self, _end, process)
        return process

    def _send(self, message: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then the next answer is missing, too
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self, messages: int, seconds: float) -> list[Piece] | Unfit:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith(b"\n"):
            kind, value = json.loads(line)
            if kind == "broken":
                raise Broken(value)
            return Unfit(value) if kind == "unfit" else [Piece(*piece) for piece in value]
        code = self._process.wait()
        if code == -signal.SIGPROF:
            count = f"{messages:,} message{'s' * (messages != 1)}"
            raise Broken(f"needs more than {seconds:g} s of a processor to write {count}")
        end = signal.Signals(-code).name if code < 0 else f"code {code}"
        raise Broken(f"ends the process that renders it ({end})")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # of what the process didn't read any more
            assert pipe is not None
            pipe.close()


def seconds_for(messages: int, is_prompt: bool) -> float:
    """Return the limit of a conversation: the time that it takes grows with its messages."""
    return _PROMPT_SECONDS if is_prompt else _SECONDS * max(1, messages / 1000)


def serve() -> None:
    """Main loop of the process: read batches of conversations, until its parent ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends this process within any function
    with suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    division = Division(*json.loads(sys.stdin.buffer.readline()))
    for line in sys.stdin.buffer:
        is_prompt, limits, conversations = json.loads(line)
        for messages, seconds in zip(conversations, limits, strict=True):
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer = json.dumps(_answer(division, messages, is_prompt))
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(
    division: Division, messages: Sequence[Message], is_prompt: bool
) -> tuple[str, list[Piece] | str]:
    try:
        return "pieces", division.prompt(messages) if is_prompt else division.turns(messages)
    except Unfit as e:
        return "unfit", str(e)
    except Broken as e:
        return "broken", str(e)
    except MemoryError:
        return "broken", f"needs more than {_MEMORY >> 20:,} MiB of memory"
