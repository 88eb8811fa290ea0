"""Mixtures: exact shares, each source in its own order, closed form at any distance."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.data.mixture import MemberMixture, Mixture, MixtureStage, unskipped
from forescale.data.order import Order

ORDERS = {
    "a": Order([300, 41, 1, 77], 8, 1, 2),
    "b": Order([50] * 5, 8, 2, 3),
    "c": Order([999], 8, 3, 1),
}
weights = st.lists(st.integers(0, 30), min_size=3, max_size=3).filter(any)
stages = st.builds(
    lambda gaps, shares: [
        MixtureStage.of(sum(gaps[:i]), share) for i, share in enumerate(shares[: len(gaps) + 1])
    ],
    st.lists(st.integers(1, 1500), max_size=2),
    st.lists(weights, min_size=3, max_size=3),
)


@given(stages=stages, seed=st.integers(0, 9), cuts=st.lists(st.integers(1, 300), max_size=6))
@settings(max_examples=8, deadline=None)
def test_every_source_keeps_its_own_order_for_any_cuts_of_the_samples(stages, seed, cuts):
    mixture = Mixture(ORDERS, stages, seed)
    total = 4_000
    whole = mixture.places(0, total)
    for source, order in enumerate(ORDERS.values()):
        mine = whole.source == source
        of_source = order.windows(0, int(mine.sum()))
        for got, want in zip(whole[1:], of_source, strict=True):
            assert np.array_equal(got[mine], want)
    g = 0
    for count in [*cuts, 1000]:
        part = mixture.places(g, g + count)
        for got, want in zip(part, whole, strict=True):
            assert np.array_equal(got, want[g : g + count])
        targets = np.bincount(part.source, part.length - 1, minlength=3)
        assert mixture.targets(g, g + count).tolist() == targets.tolist()
        g += count
    assert mixture.samples(g).tolist() == np.bincount(whole.source[:g], minlength=3).tolist()


@pytest.mark.parametrize("count", [2, 3])
def test_members_read_the_windows_of_a_mixture_between_them(count):
    stages = [MixtureStage.of(0, [1, 2, 3]), MixtureStage.of(700, [0, 1, 1])]
    whole, each = Mixture(ORDERS, stages, 4), 500
    places = np.array(whole.places(0, count * each))
    for index in range(count):
        member = MemberMixture(ORDERS, stages, 4, index, count)
        part = np.array(member.places(0, each))
        assert np.array_equal(part, places[:, index::count])
        assert np.array_equal(np.array(member.places(123, 234)), part[:, 123:234])
        assert member.numbers(0, each).tolist() == list(range(index, count * each, count))
        targets = np.bincount(part[0, 9:99], part[3, 9:99] - 1, minlength=3)
        assert member.targets(9, 99).tolist() == targets.tolist()
        assert member.epochs(each) == whole.epochs(count * each)


@given(stages=stages, seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_shares_are_exact_at_the_end_of_every_block(stages, seed):
    mixture = Mixture(ORDERS, stages, seed)
    firsts = [stage.first for stage in stages]
    for i, stage in enumerate(stages):
        end = firsts[i + 1] if i + 1 < len(firsts) else stage.first + 9 * 1024
        before, share = mixture.samples(stage.first), np.array(stage.weights, object)
        share = share / sum(share)
        ends = list(range(stage.first + 1024, end, 1024))
        ends = [g for g in ends if end - g >= 1024 or i + 1 == len(stages)]
        for g in [*ends, end]:
            counts = mixture.samples(g) - before
            exact = [s * (g - stage.first) for s in share]
            assert sum(counts) == g - stage.first
            assert all(abs(n - e) < 1 for n, e in zip(counts.tolist(), exact, strict=True))


def test_a_small_share_gets_a_longer_block_and_is_not_lost():
    mixture = Mixture(ORDERS, [MixtureStage.of(0, [0.9999, 0.0001, 0])], 0)
    counts = mixture.samples(200_000)
    assert counts.tolist() == [199_980, 20, 0]


def test_sources_are_mixed_inside_a_block_and_depend_on_the_seed():
    stage = [MixtureStage.of(0, [1, 1, 2])]
    first = Mixture(ORDERS, stage, 0).places(0, 1024).source
    assert len(set(first[:32].tolist())) == 3
    assert (first != Mixture(ORDERS, stage, 1).places(0, 1024).source).any()


def test_a_large_g_costs_no_more_than_a_small_one():
    mixture = Mixture(
        ORDERS, [MixtureStage.of(0, [0.5, 0.3, 0.2]), MixtureStage.of(10**6, [0, 1, 3])], 5
    )
    far = mixture.places(10**12, 10**12 + 100)
    again = Mixture(
        ORDERS, [MixtureStage.of(0, [0.5, 0.3, 0.2]), MixtureStage.of(10**6, [0, 1, 3])], 5
    )
    assert np.array_equal(again.places(10**12 + 50, 10**12 + 100).start, far.start[50:])
    assert mixture.epochs(10**12)["a"] == 500_000 / ORDERS["a"].windows_per_epoch


def test_weights_are_exact_decimals():
    assert MixtureStage.of(0, [0.1, 0.2, 1e-3]).weights == (
        Fraction(1, 10),
        Fraction(1, 5),
        Fraction(1, 1000),
    )


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [1, 1e-9]])
def test_invalid_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"share|negative"):
        MixtureStage.of(0, weights)


def test_stages_begin_at_0_and_ascend():
    for firsts in ([1], [0, 5, 5], [0, 9, 3], []):
        with pytest.raises(ValueError, match="stages"):
            Mixture(ORDERS, [MixtureStage.of(first, [1, 1, 1]) for first in firsts], 0)


@given(
    skipped=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), max_size=5),
    g=st.integers(0, 220),
    count=st.integers(1, 60),
)
def test_exactly_the_skipped_samples_are_skipped(skipped, g, count):
    gone = {s for start, size in skipped for s in range(start, start + size)}
    merged: list[tuple[int, int]] = []
    for a, b in sorted((start, start + size) for start, size in skipped):
        if merged and a < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    rest = [s for a, b in unskipped(merged, g, count) for s in range(a, b)]
    want = [s for s in range(g, 1000) if s not in gone][:count]
    assert rest == want
