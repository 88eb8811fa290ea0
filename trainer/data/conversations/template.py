"""Chat templates: the messages of a conversation become one text, and its ids.

A template is Jinja, in the format of Hugging Face tokenizers, or the plain one of this file.

Invariant: a response is the text that a template adds after the prompt for generation, up to the
token that ends it. Training and generation have the same ids, piece by piece: a model is prompted
with what it read before each response. A template runs in Jinja's sandbox: it may come from a
download.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from forescale.ground.errors import UserError

Message = Mapping[str, str]  # role and content
ROLES = ("system", "user", "assistant")

PLAIN = """\
{%- for message in messages -%}
{{ message.role | capitalize }}:
{{ message.content }}{{ eos_token if message.role == "assistant" else "" }}

{% endfor -%}
{%- if add_generation_prompt %}Assistant:
{% endif -%}
"""

_SHORT: Sequence[Message] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
)


class Unfit(Exception):
    """A conversation that can't be used; the text says why, as a reason to count."""


class Piece(NamedTuple):
    """A part of a conversation. learned: whether it is a response."""

    text: str
    learned: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template. source: its text; where: what a message calls it; special: the texts of the
    tokenizer's special tokens, with which a response may end; tokens: bos_token and eos_token, as
    the template reads them."""

    source: str
    where: str
    special: tuple[str, ...]
    tokens: Mapping[str, str]

    def check(self) -> None:
        """Raise UserError if it can't be read, or not even a question and an answer fit it."""
        try:
            self.pieces(_SHORT)
        except (TemplateError, Unfit) as e:
            problem = f"this chat template can't write a question and its answer ({e})"
            raise UserError(self.where, problem, "give another one with template=FILE") from e

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the model writes its next response. Raises Unfit."""
        self._check_special(messages)
        return self._rendered(messages, is_prompt=True)

    def prompt_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the parts of `prompt`: the turns so far as in `pieces`, and the rest. One part
        where the template writes a turn in another way once others follow. Raises Unfit."""
        whole = self.prompt(messages)
        try:
            turns = self.pieces(messages)
        except Unfit:
            return [Piece(whole, False)]
        done = "".join(piece.text for piece in turns)
        if not whole.startswith(done):
            return [Piece(whole, False)]
        return [*turns, Piece(whole[len(done) :], False)]

    @cached_property
    def turn_end(self) -> str | None:
        """The special token that ends a response; None: there is none."""
        try:
            _, (response, _) = self.pieces(_SHORT)
        except Unfit:
            return None
        ends = [token for token in self.special if token and response.endswith(token)]
        return max(ends, key=len, default=None)

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the parts up to the last response, read and learned in turn. Raises Unfit."""
        self._check_special(messages)
        turns: list[Piece] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:i], is_prompt=True)
            after = self._rendered(messages[: i + 1], is_prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise Unfit("of which the chat template writes a turn in two ways")
            response = after[len(before) :]
            ends = [response.rfind(s) + len(s) for s in self.special if s in response]
            response = response[: max(ends)] if ends else response
            turns += [Piece(before[len(done) :], False), Piece(response, True)]
            done = before + response
        return turns

    def _check_special(self, messages: Sequence[Message]) -> None:
        """Raise Unfit where a message spells a special token: it would become that token, and a
        user could end a turn, or write one of the assistant's."""
        if any(token in message["content"] for token in self.special for message in messages):
            raise Unfit("with a special token in a message")

    def _rendered(self, messages: Sequence[Message], is_prompt: bool) -> str:
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=is_prompt, **self.tokens
            )
        except TemplateError as e:
            raise Unfit(f"that the chat template refuses ({e})") from e

    @cached_property
    def _compiled(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )

        def as_json(value: Any, indent: int | None = None, **_: Any) -> str:
            # Unlike Jinja's own filter, which escapes for HTML.
            return json.dumps(value, ensure_ascii=False, indent=indent)

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment.filters["tojson"] = as_json
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.source)
        except TemplateError as e:
            problem = f"this chat template can't be read ({e})"
            raise UserError(self.where, problem, "give another one with template=FILE") from e


def chat_ids(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], end: int
) -> list[int]:
    """Return the ids after which the model writes its next response. end: of the token that ends a
    text. Raises Unfit if the template can't write the conversation."""
    pieces = template.prompt_pieces(messages)
    parts = encoded_parts(tokenizer, [piece.text for piece in pieces], has_special=True)
    return joined(pieces, parts, end, special_ids(tokenizer))[0]


def encoded_parts(tokenizer: Tokenizer, texts: Sequence[str], has_special: bool) -> list[list[int]]:
    """Return the ids of each text. has_special: the texts of special tokens become these tokens."""
    tokenizer.encode_special_tokens = not has_special
    encoded = tokenizer.encode_batch_fast([*texts], add_special_tokens=False)
    return [one.ids for one in encoded]


def joined(
    pieces: Sequence[Piece], parts: Sequence[list[int]], end: int, special: Collection[int]
) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation and which of them are learned, from those of its pieces. A
    response that ends with no special token gets `end`, which a model must learn to write."""
    ids: list[int] = []
    learned: list[bool] = []
    for piece, part in zip(pieces, parts, strict=True):
        if piece.learned and not (part and part[-1] in special):
            part = [*part, end]
        if not ids and not part:
            part = [end]  # the token before a text: an empty prompt is this token, too
        ids += part
        learned += [piece.learned] * len(part)
    return ids, learned


def special_ids(tokenizer: Tokenizer) -> set[int]:
    added = tokenizer.get_added_tokens_decoder()
    return {index for index, token in added.items() if token.special}
