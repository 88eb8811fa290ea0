"""A conversation divided into pieces by a chat template, read and learned in turn.

Invariant: the pieces are those of a rendering of each beginning of the conversation, whatever the
template looks at. Jinja's sandbox gives a template no files and no objects.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_GROWTH, _SPARE = 16, 1 << 10  # times the bytes of messages, and of each so many more
_REASON = 300  # characters of a template's own message

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
