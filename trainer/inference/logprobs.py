"""Log probabilities of tokens, as a model alone gives them: at temperature 1, over all tokens.

Invariant: what a sampler rules out or prefers changes none of them, and the likeliest token of a
place has the same number among the likeliest and as the one that was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LEAST = -9999.0  # in the place of -inf, which JSON doesn't have; OpenAI's number for it
Likeliest = tuple[tuple[int, float], ...]  # ids with their log probabilities, the highest first


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer. text: its own; offset: where it begins in the answer, in characters;
    logprob: in nats, None for the first of a prompt, before which the model read nothing;
    likeliest: the texts of the likeliest tokens of its place, with theirs."""

    text: str
    offset: int
    logprob: float | None
    likeliest: tuple[tuple[str, float], ...]


def scored(logits_NV: Tensor, ids: Sequence[int], count: int) -> list[tuple[float, Likeliest]]:
    """Return the log probability of an id for each row of logits, and the `count` likeliest. Raises
    FloatingPointError if the logits give none."""
    chosen = torch.as_tensor(ids, device=logits_NV.device)[:, None]
    total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    if not total_N1.isfinite().all():
        raise FloatingPointError("the logits are not finite")
    values = (logits_NV.gather(1, chosen) - total_N1).clamp_min(LEAST)[:, 0].tolist()
    top = logits_NV.topk(min(count, logits_NV.shape[1]))
    numbers = (top.values - total_N1).clamp_min(LEAST).tolist()
    pairs = zip(top.indices.tolist(), numbers, strict=True)
    likeliest = [tuple(zip(*pair, strict=True)) for pair in pairs]
    return [*zip(values, likeliest, strict=True)]


@torch.inference_mode()
def of_prompt(model: nn.Module, ids: Sequence[int], count: int) -> list[tuple[float, Likeliest]]:
    """Return `scored` of the ids of a prompt but for the first. The model is in eval mode."""
    device = next(model.parameters()).device
    logits_LV = model(torch.tensor([ids], device=device))[0, :-1].float()
    return scored(logits_LV, ids[1:], count)
