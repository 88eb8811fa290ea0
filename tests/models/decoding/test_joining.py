"""Rows that join a batch between steps, and leave it, are continued as they are alone."""

import pytest
import torch

from forescale.models import Transformer
from forescale.models.decoding.batch import Batch, Choice, generate
from forescale.models.decoding.sampler import Sampler
from tests.models.decoding.test_batches import CASES, GREEDY, padded, prompts
from tests.models.mixers.test_every_mixer import build

LENGTH = 8


def begun(model, rows, samplers=None, seeds=None, sources=None) -> Batch:
    tokens, real = padded(rows)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(rows))]
    choice = Choice(samplers or [GREEDY] * len(rows), generators)
    source = (None, None) if sources is None else padded(sources)
    return Batch(model, tokens, choice, None, real, *source)


def joined(model, first: Batch, second: Batch) -> list[list[int]]:
    """What all rows get: of the first batch 4 tokens before the second joins. Of three rows the
    first, which is the longest, leaves when it has 6, and the others change places."""
    stored: list[list[int]] = [[] for _ in range(len(first) + len(second))]
    order = [*range(len(first))]

    def step(batch: Batch, rows: list[int]) -> None:
        for row, token in zip(rows, batch.step()[:, 0].tolist(), strict=True):
            stored[row].append(token)

    for _ in range(4):
        step(first, order)
    new = [*range(len(first), len(stored))]
    step(second, new)
    first.join(second)
    order += new
    for _ in range(2):
        step(first, order)
    first.keep([*range(len(order))][:0:-1])
    order = order[:0:-1]
    while min(len(stored[row]) for row in order) < LENGTH:
        step(first, order)
    return [row[:LENGTH] for row in stored]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([*case[0], case[1]]))
@pytest.mark.parametrize("lengths", [(9, 2, 5), (2, 4, 11)], ids=["shorter", "longer"])
def test_a_row_that_joins_is_continued_as_it_is_alone(case, lengths):
    pattern, position = case
    model: Transformer = build(pattern, position=position)
    rows = prompts(model, lengths)
    got = joined(model, begun(model, rows[:2]), begun(model, rows[2:]))
    assert [len(row) for row in got] == [6, LENGTH, LENGTH]
    for row, ids in zip(rows, got, strict=True):
        alone = generate(model, row, len(ids), sampler=GREEDY)
        assert alone[0, row.shape[1] :].tolist() == ids


def test_decoders_of_sources_of_different_lengths_join():
    model = build(["attention"], encoder_layers=1, source_length=16)
    rows, sources = prompts(model, (3, 3, 2)), prompts(model, (5, 9, 7))
    got = joined(
        model,
        begun(model, rows[:2], sources=sources[:2]),
        begun(model, rows[2:], sources=sources[2:]),
    )
    for row, source, ids in zip(rows, sources, got, strict=True):
        alone = generate(model, row, len(ids), sampler=GREEDY, source_BS=source)
        assert alone[0, row.shape[1] :].tolist() == ids


def test_each_row_has_its_own_rules_and_draws_whatever_company_it_has():
    model = build(["attention"])
    rows, seeds = prompts(model), (5, 6, 7)
    samplers = [Sampler(0.7), GREEDY, Sampler(1.3, top_p=0.9, repetition_penalty=1.5)]
    got = joined(
        model,
        begun(model, rows[:2], samplers[:2], seeds[:2]),
        begun(model, rows[2:], samplers[2:], seeds[2:]),
    )
    for row, sampler, seed, ids in zip(rows, samplers, seeds, got, strict=True):
        drawn = torch.Generator().manual_seed(seed)
        alone = generate(model, row, len(ids), sampler=sampler, generator=drawn)
        assert alone[0, row.shape[1] :].tolist() == ids


@torch.inference_mode()
def test_what_is_padding_in_all_rows_is_dropped():
    model = build(["attention"])
    batch = begun(model, prompts(model, (9, 2, 2)))
    batch.step()
    batch.keep([1, 2])
    assert batch.tokens.shape[1] == 3
    assert batch.cache.length == 2
    assert batch.real is None, "rows of one length need no mask"
