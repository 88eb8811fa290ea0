"""Text from a model, as it comes.

Invariant: what is yielded adds up to the decoded whole, and never holds half a character: a
character whose bytes are spread over several tokens comes with the last of them.
"""

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer
from torch import nn

from forescale.models.generate import generate

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 4  # tokens that a decoder is shown before new ones


def prompt_ids(tokenizer: Tokenizer, prompt: str, end_of_text: int) -> list[int]:
    """The ids of a prompt; of an empty one the token that stands before every document."""
    # As in training, "<|endoftext|>" within a text is text.
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(prompt, add_special_tokens=False).ids or [end_of_text]


def sampled(
    model: nn.Module,
    prompt: list[int],
    num_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    seed: int,
    max_context: int,
) -> Iterator[int]:
    """Up to `num_tokens` ids that the model writes after `prompt`, as models/generate.py draws;
    the same seed on the same device writes the same."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(num_tokens):
        tokens = generate(model, tokens, 1, temperature, top_k, generator, max_context)
        yield int(tokens[0, -1])


def pieces(tokenizer: Tokenizer, before: list[int], ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids`, which follow `before`, in pieces of whole characters."""
    # A decoder may look back (SentencePiece's drops a leading space), so each piece is the
    # difference that new ids make to the text of the last ones.
    held, said = list(before), len(before)

    def text(end: int) -> str:
        return tokenizer.decode(held[:end])

    for token in ids:
        held.append(token)
        if not text(len(held)).endswith(_BROKEN):
            yield text(len(held))[len(text(said)) :]
            held = held[-_CONTEXT:]
            said = len(held)
    yield text(len(held))[len(text(said)) :]
