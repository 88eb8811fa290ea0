"""Chat templates: the messages of a conversation become one text, and its ids.

A template is Jinja, in the format of Hugging Face tokenizers, or the plain one of this file.

Invariant: a response is the text that a template adds after the prompt for generation, up to the
token that ends it. Training and generation have the same ids, piece by piece: a model is prompted
with what it read before each response.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from forescale.data.conversations.division import Broken, Message, Piece, Unfit
from forescale.data.conversations.rendering import Renderer
from forescale.ground.errors import UserError

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
            _, (response, _) = self.pieces(_SHORT)
            if _SHORT[1]["content"] not in response.casefold():
                raise Unfit("of which the chat template leaves out the response")
        except Unfit as e:
            raise self._error(f"is of no use: a short chat is a conversation {e}") from e

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the model writes its next response. Raises as
        `prompt_pieces`."""
        return "".join(piece.text for piece in self.prompt_pieces(messages))

    def prompt_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the parts of `prompt`: the turns so far as in `pieces`, and the rest. One part
        where the template writes a turn in another way once others follow. Raises Unfit, and
        UserError if the template can't be read or goes beyond its limits."""
        return _fit(self._all_pieces([messages], is_prompt=True)[0])

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the parts up to the last response, read and learned in turn. Raises as
        `prompt_pieces`."""
        return _fit(self.all_pieces([messages])[0])

    def all_pieces(self, conversations: Sequence[Sequence[Message]]) -> list[list[Piece] | Unfit]:
        """Return the `pieces` of each conversation, or why it can't be used. Raises UserError."""
        return self._all_pieces(conversations, is_prompt=False)

    def _all_pieces(
        self, conversations: Sequence[Sequence[Message]], is_prompt: bool
    ) -> list[list[Piece] | Unfit]:
        try:
            return self._renderer.pieces(conversations, is_prompt)
        except Broken as e:
            raise self._error(str(e)) from e

    @cached_property
    def turn_end(self) -> str | None:
        """The special token that ends a response; None: there is none."""
        try:
            _, (response, _) = self.pieces(_SHORT)
        except Unfit:
            return None
        ends = [token for token in self.special if token and response.endswith(token)]
        return max(ends, key=len, default=None)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.source, self.special, self.tokens)

    def _error(self, problem: str) -> UserError:
        return UserError(
            self.where, f"this chat template {problem}", "give another one with template=FILE"
        )


def _fit(pieces: list[Piece] | Unfit) -> list[Piece]:
    if isinstance(pieces, Unfit):
        raise pieces
    return pieces


def chat_ids(tokenizer: Tokenizer, pieces: Sequence[Piece], end: int) -> list[int]:
    """Return the ids after which the model writes its next response, of `prompt_pieces`. end: of
    the token that ends a text."""
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
