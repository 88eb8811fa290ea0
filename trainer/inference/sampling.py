"""Ids that a model samples after prompts.

Invariant: a prompt gets the ids that it would get alone, whatever prompts are beside it.
"""

from collections.abc import Generator, Iterator, Sequence

import torch
from tokenizers import Tokenizer
from torch import nn

from forescale.data.tokenizer import text_ids
from forescale.errors import UserError
from forescale.models.decoding.generate import stream
from forescale.models.decoding.sampler import Sampler


def prompt_ids(tokenizer: Tokenizer, prompt: str, end_of_text: int) -> list[int]:
    """Return the ids of a prompt; of an empty one, the token that precedes every document."""
    return text_ids(tokenizer, prompt) or [end_of_text]


def sampled(
    model: nn.Module,
    prompt: list[int],
    num_tokens: int,
    sampler: Sampler,
    *,
    seed: int,
    max_context: int,
) -> Iterator[int]:
    """Yield `num_tokens` ids that the model samples after `prompt`; errors as of `rows_sampled`."""
    rows = rows_sampled(model, [prompt], num_tokens, sampler, seeds=[seed], max_context=max_context)
    for (token,) in rows:
        yield token


def rows_sampled(
    model: nn.Module,
    prompts: Sequence[list[int]],
    num_tokens: int,
    sampler: Sampler,
    *,
    seeds: Sequence[int],
    max_context: int,
    sources: Sequence[list[int]] | None = None,
) -> Generator[list[int], list[int] | None]:
    """Yield the next id of each prompt, at most num_tokens times; see models/decoding/generate.py.

    A caller may send the numbers of the rows that go on; later ids are of those. seeds: of each
    prompt, which gets the ids that it would get alone; sources: what an encoder reads, of an
    encoder-decoder. Prompts and sources may differ in length. Raises UserError if the model's
    logits are not finite.
    """
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on any device the same
    tokens, real = padded(prompts, device)
    source, shown = (None, None) if sources is None else padded(sources, device)
    ids = stream(model, tokens, sampler, generators, max_context, real, source, shown, num_tokens)
    going: torch.Tensor | None = None
    try:
        for _ in range(num_tokens):
            try:
                found = ids.send(going)
            except StopIteration:  # a decoder that may read no more
                return
            rows = yield found[:, 0].tolist()
            going = None if rows is None else torch.tensor(rows, device=device)
    except FloatingPointError as e:
        todo = "use an earlier checkpoint, from before the training diverged"
        raise UserError("the model", f"can't write text ({e})", todo) from e
    finally:
        ids.close()


def padded(
    rows: Sequence[list[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return rows of ids, (B, L), padded on the left, and which are real; None: all."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    if min(map(len, rows)) == longest:
        return tokens, None
    real = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return tokens, torch.tensor(real, device=device)
