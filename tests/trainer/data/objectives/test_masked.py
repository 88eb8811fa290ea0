"""Masked tokens: what is masked and how often, the same on every path through the data."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forescale.data.dataset import Dataset
from forescale.data.objective import IGNORED, Draws
from forescale.data.objectives.masked import MaskedTokens
from forescale.data.stream import validation_windows
from tests.trainer.data.test_stream import collect, make_feed

V = 257


def windows(count, length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, V, (count, length + 1)).astype("<u2")
    return tokens, np.full(count, length + 1), np.arange(count)


@pytest.mark.parametrize(
    ("rate", "hidden", "random"), [(0.15, 0.8, 0.1), (0.4, 0.5, 0.5), (0.2, 1, 0), (0.1, 0, 0)]
)
def test_the_shares_are_those_of_the_config_over_many_windows(rate, hidden, random):
    tokens, sizes, numbers = windows(2000, 100)
    inputs, targets = MaskedTokens(V, 7, 100, rate, hidden, random).examples(tokens, sizes, numbers)
    text, chosen = tokens[:, :-1].astype(np.int64), targets != IGNORED
    assert (chosen.sum(1) == round(rate * 100)).all()
    assert np.array_equal(targets[chosen], text[chosen])
    assert np.array_equal(inputs[~chosen], text[~chosen])
    assert (inputs[~chosen] < V).all()
    n, masked = chosen.sum(), inputs[chosen] == V
    changed = ~masked & (inputs[chosen] != text[chosen])
    for places, share in ((masked, hidden), (changed, random * (1 - 1 / V))):
        assert places.mean() == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / n))
    # No place in a window and no token of the vocabulary is favoured.
    counts = chosen.sum(0)
    assert np.abs(counts / 2000 - rate).max() < 5 * np.sqrt(rate * (1 - rate) / 2000)
    if random:
        drawn = np.bincount(inputs[chosen][changed], minlength=V)[:V]
        assert np.square(drawn - drawn.mean()).sum() / drawn.mean() < 2 * V  # chi-square


@given(size=st.integers(2, 300), number=st.integers(0, 10**12), rate=st.floats(0.01, 0.99))
def test_the_number_of_targets_depends_on_the_length_alone(size, number, rate):
    tokens = np.zeros((1, 301), np.uint16)
    tokens[0, :size] = np.arange(size) % V
    objective = MaskedTokens(V, 3, 300, rate)
    sizes = np.array([size])
    inputs, targets = objective.examples(tokens, sizes, np.array([number]))
    (count,) = objective.num_targets(sizes)
    assert 1 <= count == (targets != IGNORED).sum() <= size - 1
    assert (targets[0, size - 1 :] == IGNORED).all()
    assert not inputs[0, size - 1 :].any()


def test_a_row_of_padding_has_no_target():
    objective = MaskedTokens(V, 3, 64)
    assert objective.num_targets(np.array([1])) == 0
    pair = objective.examples(np.zeros((1, 9), np.uint16), np.array([1]), np.array([0]))
    assert (pair[1] == IGNORED).all()


def test_a_mask_depends_on_seed_and_number_and_not_on_its_neighbours():
    tokens, sizes, _ = windows(1, 64)
    rows = np.repeat(tokens, 6, 0)
    numbers = np.array([5, 6, 5, 10**15, 7, 6])
    pair = MaskedTokens(V, 1, 64).examples(rows, np.repeat(sizes, 6), numbers)
    for i, j in ((0, 2), (1, 5)):
        assert np.array_equal(pair[:, i], pair[:, j])
    for i, j in ((0, 1), (0, 3), (1, 4)):
        assert not np.array_equal(pair[1, i], pair[1, j])
    alone = MaskedTokens(V, 1, 64).examples(tokens, sizes, np.array([7]))
    assert np.array_equal(alone[:, 0], pair[:, 4])
    other = MaskedTokens(V, 2, 64).examples(tokens, sizes, np.array([7]))
    assert not np.array_equal(alone, other)


def test_draws_are_the_bits_that_numpy_promises():
    """Philox 4x64-10 with key (1337, 42), as numpy, and as the rounds of its paper."""
    assert Draws(1337, 42).below(2**63, 4).tolist() == [
        value % 2**63 for value in philox((1, 0, 0, 0), (1337, 42))
    ]
    assert sorted(Draws(3, 4).chosen(50, 50)) == list(range(50))


def philox(counter, key):
    """Ten rounds of Philox 4x64 (Salmon et al. 2011, figure 2 and table 2)."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


@pytest.fixture
def feed(dataset):
    split = Dataset(dataset).split("train")
    return make_feed({"data": split}, 64, 3, 2, objective=MaskedTokens(V, 3, 64))


def test_only_a_micro_batch_with_a_short_window_hides_padding(feed):
    num_micro = {True: 0, False: 0}
    for _, micros, _ in collect(feed, (0, 60), 0, 1, 8, 2):
        for micro in micros:
            is_short = bool((micro.tokens[:, -1] == 0).any() and micro.padding_mask is not None)
            num_micro[is_short] += 1
            if micro.padding_mask is not None:
                assert not micro.padding_mask.all()
                assert not micro.tokens[~micro.padding_mask].any()
                assert (micro.targets[~micro.padding_mask] == IGNORED).all()
                _, named = micro.arguments(torch.device("cpu"))
                assert named["padding_mask_BL"] is micro.padding_mask
            else:
                assert micro.arguments(torch.device("cpu"))[1] == {}
    assert min(num_micro.values()) > 0, num_micro


@pytest.mark.parametrize("documents", [False, True])
def test_held_out_masks_are_fixed(dataset, documents):
    """At any micro-batch and world size, and for a part of the windows as for all."""
    split, objective = Dataset(dataset).split("validation"), MaskedTokens(V, 0, 32)

    def rows(micro, world=1, limit=None):
        by_number = {}
        for rank in range(world):
            settings = dict(limit=limit, documents=documents, objective=objective)
            for m in validation_windows(split, 32, micro, rank, world, **settings):
                for i in range(len(m.tokens)):
                    if (m.targets[i] != IGNORED).any():
                        by_number[m.index * micro + i] = (
                            m.tokens[i].tolist(),
                            m.targets[i].tolist(),
                        )
        return [by_number[i] for i in sorted(by_number)]

    whole = rows(1)
    assert rows(3) == rows(2, 3) == whole
    part = rows(2, limit=5)
    assert part == [whole[i * len(whole) // 5] for i in range(5)]
