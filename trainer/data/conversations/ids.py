"""The ids of a conversation, whether a model learns it or is asked for its next response.

Invariant: both are the same ids, part by part: a model that learned a conversation is asked with
what it read before each response.
"""

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

from forescale.data.conversations.template import ChatTemplate, Message, Piece


def asked_ids(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], end: int
) -> list[int]:
    """Return the ids after which the model writes its next response. end: of the token that ends a
    text. Raises Unfit if the template can't write the conversation."""
    pieces = template.asked(messages)
    parts = encoded_parts(tokenizer, [piece.text for piece in pieces], has_special=True)
    return joined(pieces, parts, end, special_ids(tokenizer))[0]


def encoded_parts(tokenizer: Tokenizer, texts: Sequence[str], has_special: bool) -> list[list[int]]:
    """Return the ids of each text. has_special: special tokens in it are tokens, and no text."""
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
    for piece, own in zip(pieces, parts, strict=True):
        if piece.learned and not (own and own[-1] in special):
            own = [*own, end]
        if not ids and not own:
            own = [end]  # the token before a text, as of an empty prompt when it is asked
        ids += own
        learned += [piece.learned] * len(own)
    return ids, learned


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of the special tokens."""
    added = tokenizer.get_added_tokens_decoder()
    return {index for index, token in added.items() if token.special}
