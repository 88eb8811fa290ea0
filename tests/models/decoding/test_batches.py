"""Prompts of different lengths in one batch, padded on the left: each is continued as it is alone,
with every mixer and every kind of position."""

import pytest
import torch

from forescale.models import Transformer
from forescale.models.decoding.batch import Batch, Choice, generate
from forescale.models.decoding.sampler import Sampler
from forescale.models.positions.kinds import POSITIONS
from tests.models.mixers.test_every_mixer import PATTERNS, RESIDUAL, build

GREEDY = Sampler(temperature=0)
LENGTHS = (9, 2, 6)
CASES = [(pattern, "rotary") for pattern in PATTERNS + RESIDUAL]
CASES += [(["attention"], position) for position in POSITIONS if position != "rotary"]


def prompts(model: Transformer, lengths=LENGTHS) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(5)
    size = model.config.sizes.vocab_size
    return [torch.randint(0, size, (1, length), generator=drawn) for length in lengths]


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(row.shape[1] for row in rows)
    pads = [longest - row.shape[1] for row in rows]
    pairs = zip(rows, pads, strict=True)
    tokens = [torch.nn.functional.pad(row, (pad, 0), value=7) for row, pad in pairs]
    real = [torch.arange(longest)[None] >= pad for pad in pads]
    return torch.cat(tokens), torch.cat(real)


@pytest.fixture(params=CASES, ids=lambda case: "-".join([*case[0], case[1]]))
def model(request) -> Transformer:
    pattern, position = request.param
    return build(pattern, position=position)


def test_each_row_is_continued_as_it_is_alone(model):
    """18 tokens, of which the last leave the context of 20."""
    rows = prompts(model)
    tokens, real = padded(rows)
    how = dict(sampler=GREEDY, max_context=20)
    got = generate(model, tokens, 18, padding_mask_BL=real, **how)
    for row, together in zip(rows, got, strict=True):
        alone = generate(model, row, 18, **how)[0]
        assert torch.equal(together[-len(alone) :], alone)
    assert got[:, -18:].unique().numel() > 4


@torch.no_grad()
def test_rows_that_are_dropped_change_nothing_for_the_others(model):
    rows = prompts(model)
    tokens, real = padded(rows)
    batch = Batch(model, tokens, Choice([GREEDY] * len(rows)), None, real)
    got = [batch.step()]
    batch.keep([2, 1])
    got += [batch.step() for _ in range(11)]
    saved = torch.cat([got[0][[2, 1]], *got[1:]], 1)
    for i, row in enumerate((rows[2], rows[1])):
        alone = generate(model, row, 12, sampler=GREEDY)
        assert torch.equal(saved[i], alone[0, row.shape[1] :])


@torch.no_grad()
def test_logits_of_a_batch_are_those_of_each_row_alone(model):
    rows = prompts(model)
    tokens, real = padded(rows)
    cache, after = model.new_cache(), torch.tensor([[3], [4], [5]])
    first = model(tokens, padding_mask_BL=real, cache=cache, last=1)
    cache.keep(torch.tensor([0, 2]))
    second = model(after[[0, 2]], cache=cache)
    for i, number in enumerate((0, 2)):
        alone = model(torch.cat([rows[number], after[[number]]], 1))[0]
        torch.testing.assert_close(first[number, -1], alone[-2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second[i, -1], alone[-1], rtol=1e-4, atol=1e-5)


def test_a_row_draws_as_it_does_alone():
    model = build(["attention"])
    rows = prompts(model)
    tokens, real = padded(rows)
    sampler = Sampler(temperature=1.5, top_k=20, top_p=0.95, repetition_penalty=1.2)

    def drawn(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    got = generate(
        model, tokens, 15, sampler=sampler, generator=drawn(3, 4, 5), padding_mask_BL=real
    )
    for row, seed, together in zip(rows, (3, 4, 5), got, strict=True):
        alone = generate(model, row, 15, sampler=sampler, generator=drawn(seed))[0]
        assert torch.equal(together[-len(alone) :], alone)


def test_padding_is_no_token_that_a_row_holds():
    """The penalty is for what a row holds, and 0 stands at its padding."""
    model = build(["attention"])
    rows = [torch.tensor([[5, 9, 11]]), torch.tensor([[2]])]
    tokens, real = padded(rows)
    tokens[1, :2] = 0
    how = dict(sampler=Sampler(temperature=0, repetition_penalty=50.0))
    got = generate(model, tokens, 20, padding_mask_BL=real, **how)
    assert torch.equal(got[1, 2:], generate(model, rows[1], 20, **how)[0])
    assert got[1, 2:].unique().numel() == 21, "no token comes twice"


@torch.no_grad()
def test_room_is_made_once():
    model = build(["attention"])
    cache = model.new_cache()
    cache.reserve(24)
    model(prompts(model)[0], cache=cache)
    before, places = cache.num_bytes, [m.get("key").data_ptr() for m in cache.layers]
    for _ in range(15):
        model(torch.tensor([[1]]), cache=cache)
    assert (cache.num_bytes, [m.get("key").data_ptr() for m in cache.layers]) == (before, places)
