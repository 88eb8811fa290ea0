"""Copying of random tokens: what induction heads do (Olsson et al. 2022, arXiv 2209.11895).

A row is the token that begins documents, random tokens, and the same tokens again. Nothing but
their first copy tells what the second one is.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOST = 32  # random tokens of a row
ROWS = 32


@dataclass(frozen=True)
class Induction:
    """Of rows of `tokens` random tokens that are read twice. first, again: the mean losses of the
    tokens as they are read first and again, in nats; score: again - first, negative for a model
    that copies; share: of the tokens, as they are read again, that are the most likely next one.
    The standard errors are over rows."""

    tokens: int
    rows: int
    first: float
    again: float
    score: float
    score_stderr: float
    share: float
    share_stderr: float


def repeated_tokens(vocab_size: int, begin: int, most: int, seed: int = 0) -> Tensor:
    """Return `begin` and random tokens twice, (1 + 2n,), of at most `most` tokens."""
    n = max(2, min(MOST, (most - 1) // 2))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocab_size, (n,), generator=generator)
    return torch.cat([torch.tensor([begin]), drawn, drawn])


@torch.no_grad()
def induction(
    model: nn.Module, vocab_size: int, begin: int, most: int, rows: int = ROWS
) -> Induction:
    """Return how a model copies. begin: the token that begins documents; most: tokens of a row; the
    i-th row is drawn with seed i."""
    device = next(model.parameters()).device
    losses, hits = [], []
    for seed in range(rows):
        tokens_L = repeated_tokens(vocab_size, begin, most, seed).to(device)
        known = model(tokens_L[None, :-1])[0].float().log_softmax(-1)
        target = tokens_L[1:]
        losses.append(-known.gather(-1, target[:, None])[:, 0].double().cpu())
        hits.append((known.argmax(-1) == target).double().cpu())
    n = len(target) // 2
    first_R, again_R = (torch.stack(losses).view(rows, 2, n).mean(2)).unbind(1)
    share_R = torch.stack(hits).view(rows, 2, n)[:, 1].mean(1)
    return Induction(
        n,
        rows,
        float(first_R.mean()),
        float(again_R.mean()),
        *_mean(again_R - first_R),
        *_mean(share_R),
    )


def _mean(values_R: Tensor) -> tuple[float, float]:
    """Return the mean, and its standard error."""
    n = len(values_R)
    return float(values_R.mean()), float(values_R.std()) / math.sqrt(n) if n > 1 else math.nan
