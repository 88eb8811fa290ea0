"""Sample text from a model, piece by piece.

Invariant: the pieces add up to the text of all tokens, and none ends within a character: if the
bytes of a character are spread over several tokens, it comes with the last of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import nn

from forescale.errors import UserError
from forescale.models.generate import stream

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_NAMELESS: Mapping[int, str] = {}
_CONTEXT = 4  # previous tokens that are decoded together with new ones


def prompt_ids(tokenizer: Tokenizer, prompt: str, end_of_text: int) -> list[int]:
    """Return the ids of a prompt; of an empty one, the token that precedes every document."""
    return text_ids(tokenizer, prompt) or [end_of_text]


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text, as it would stand in a document."""
    # As in training, the text "<|endoftext|>" in a document is not a special token.
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def sampled(
    model: nn.Module,
    prompt: list[int],
    num_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    seed: int,
    max_context: int,
    source: list[int] | None = None,
) -> Iterator[int]:
    """Yield `num_tokens` ids that the model samples after `prompt`; see models/generate.py.

    source: what the encoder reads, of an encoder-decoder. The same seed on the same device gives
    the same ids. Raises UserError if the model's logits are not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([prompt], device=device)
    read = None if source is None else torch.tensor([source], device=device)
    ids = stream(model, tokens, temperature, top_k, generator, max_context, read)
    try:
        for next_11 in islice(ids, num_tokens):
            yield int(next_11)
    except FloatingPointError as e:
        todo = "use an earlier checkpoint, from before the training diverged"
        raise UserError("the model", f"can't write text ({e})", todo) from e


def pieces(
    tokenizer: Tokenizer,
    before: list[int],
    ids: Iterable[int],
    names: Mapping[int, str] = _NAMELESS,
) -> Iterator[str]:
    """Yield the text of `ids`, which follow `before`, in pieces of complete characters.

    names: of ids that the tokenizer doesn't know, as they are shown. A character ends before them.
    """
    # Decoding depends on previous tokens (SentencePiece drops a leading space), so each piece is
    # the text of the last tokens with the new ones, minus their text without.
    held, written = list(before), len(before)

    def text(end: int) -> str:
        return tokenizer.decode(held[:end])

    for token in ids:
        if token in names:
            yield text(len(held))[len(text(written)) :] + names[token]
            written = len(held)
            continue
        held.append(token)
        if not text(len(held)).endswith(_BROKEN):
            yield text(len(held))[len(text(written)) :]
            held = held[-_CONTEXT:]
            written = len(held)
    yield text(len(held))[len(text(written)) :]
