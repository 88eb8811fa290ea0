"""The rules of sampling: those of transformers' logits processors, in the same order."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from forescale.models.decoding.sampler import Sampler

B, V = 6, 200
CASES = [
    dict(),
    dict(temperature=0.3),
    dict(top_k=7),
    dict(top_k=V + 5),
    dict(top_p=0.6),
    dict(top_p=0.01),
    dict(min_p=0.2),
    dict(min_p=1.0),
    dict(repetition_penalty=1.7),
    dict(repetition_penalty=0.5),
    dict(temperature=1.6, top_k=50, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
    dict(temperature=0.7, top_k=3, top_p=0.5),
    dict(top_p=0.9, min_p=0.1),
]


def peer(rows, logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """As GenerationMixin._get_logits_processor puts them in order."""
    got = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(repetition_penalty)])
    got.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        got.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        got.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        got.append(MinPLogitsWarper(min_p))
    return got(rows, logits).softmax(-1)


def local(rows, logits, **rules):
    sampler = Sampler(**rules)
    held = torch.zeros(len(rows), logits.shape[1], dtype=torch.bool).scatter_(1, rows, True)
    scores, ids = sampler.candidates(sampler.penalised(logits, held))
    share = scores.softmax(-1)
    return share if ids is None else torch.zeros_like(logits).scatter(1, ids, share)


@pytest.mark.parametrize("rules", CASES, ids=str)
@pytest.mark.parametrize("coarse", [False, True], ids=["", "ties"])
def test_probabilities_are_those_of_transformers(rules, coarse):
    if coarse and "top_p" in rules:
        pytest.skip("which of equal tokens are the last of top_p is a matter of their sort")
    drawn = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, V, generator=drawn)
    logits = (2 * logits).round() / 2 if coarse else logits
    logits[0, 5:] = -math.inf  # a model may rule out tokens
    rows = torch.randint(0, V, (B, 30), generator=drawn)
    got, expected = local(rows, logits, **rules), peer(rows, logits.clone(), **rules)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rules", [dict(), dict(top_k=4), dict(top_p=0.9)], ids=str)
def test_tokens_come_as_often_as_they_are_likely(rules):
    logits, count = torch.tensor([[2.0, 0.0, 1.0, -1.0, 3.0, -2.0]]), 20_000
    share = peer(torch.zeros(1, 0, dtype=torch.long), logits.clone(), **rules)[0]
    drawn = torch.rand(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = Sampler(**rules).choose(logits.expand(count, -1), drawn)[:, 0]
    got = chosen.bincount(minlength=6) / count
    assert (got[share == 0] == 0).all()
    assert ((got - share).abs() < 4 * (share * (1 - share) / count).sqrt() + 1e-9).all()


def test_the_ends_of_what_can_be_drawn_are_tokens_that_may_come():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(2, -1)
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert Sampler().choose(logits, ends).tolist() == [[1], [3]]


def test_the_lowest_temperature_takes_the_most_likely_token():
    logits = torch.tensor([[5.0, 80.0, 79.0]])
    drawn = torch.tensor([[0.999]], dtype=torch.float64)
    assert Sampler(temperature=1e-38).choose(logits, drawn).item() == 1
    assert Sampler(temperature=0).choose(logits, None).item() == 1
    held = torch.tensor([[False, True, False]])
    assert Sampler(temperature=0, repetition_penalty=1.1).choose(logits, None, held).item() == 2


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-1.0),
        dict(temperature=math.nan),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(min_p=-0.1),
        dict(repetition_penalty=0.0),
    ],
    ids=str,
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} .*give"):
        Sampler(**wrong)
