"""The order is closed form: bijective, exact at any g, and every token is a target once per
epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.data.order import Order, Permutation
from forescale.ground.errors import UserError

# Uneven and tiny shards, down to those without a single window.
SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(lambda s: max(s) > 1)
ORDERS = st.builds(
    Order, SHARDS, st.integers(1, 20), seed=st.integers(-5, 2**70), shuffle_shards=st.integers(1, 8)
)


@given(st.integers(1, 500), st.integers())
@settings(max_examples=100, deadline=None)
def test_permutation_is_a_bijection_and_inverts(n, key):
    permutation = Permutation(n, key)
    x = np.arange(n)
    assert sorted(permutation(x)) == list(x)
    assert (permutation.inverse(permutation(x)) == x).all()


@pytest.mark.parametrize("n", [10**12, 2**40, 2**61 - 1])
def test_permutation_stays_in_range_and_inverts_when_huge(n):
    x = np.concatenate([np.arange(500), n - 1 - np.arange(500), np.arange(500) * (n // 500)])
    y = Permutation(n, 3)(x)
    assert y.min() >= 0
    assert y.max() < n
    assert (Permutation(n, 3).inverse(y) == x).all()


@given(SHARDS, st.integers(1, 20), st.integers(0, 9), st.integers(1, 8), st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_every_token_except_a_shards_first_is_a_target_once_per_epoch(
    shards, L, seed, block, epoch
):
    order = Order(shards, L, seed, block)
    n = order.windows_per_epoch
    targets = []
    for shard, start, length in zip(*order.windows(epoch * n, (epoch + 1) * n), strict=True):
        assert 2 <= length <= L + 1
        targets += [(shard, start + i) for i in range(1, length)]
    want = [(s, i) for s, tokens in enumerate(shards) for i in range(1, tokens)]
    assert sorted(targets) == want
    assert order.targets_per_epoch == len(want)


@given(ORDERS, st.integers(0, 300), st.integers(0, 100), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_ranges_join_and_targets_are_counted(order, g, a, b):
    whole = order.windows(g, g + a + b)
    parts = [order.windows(g, g + a), order.windows(g + a, g + a + b)]
    for field in range(3):
        assert (whole[field] == np.concatenate([p[field] for p in parts])).all()
    assert order.targets(g, g + a + b) == int((whole.length - 1).sum())


@given(ORDERS, st.integers(10**14, 10**15))
@settings(max_examples=50, deadline=None)
def test_huge_g_is_exact(order, g):
    epoch, position = divmod(g, order.windows_per_epoch)
    whole = order.windows(epoch * order.windows_per_epoch, (epoch + 1) * order.windows_per_epoch)
    assert order.window(g) == tuple(int(f[position]) for f in whole)
    assert order.targets(0, epoch * order.windows_per_epoch) == epoch * order.targets_per_epoch


def test_epochs_seeds_and_blocks_differ_and_blocks_stay_contiguous():
    order = Order([1000] * 12, 10, 0, 3)
    first, second = order.windows(0, 1200), order.windows(1200, 2400)
    assert (first.shard != second.shard).any()
    assert (first.start != Order([1000] * 12, 10, 1, 3).windows(0, 1200).start).any()
    for block in range(4):  # three shards of 100 windows at a time, thoroughly mixed
        part = first.shard[block * 300 : (block + 1) * 300]
        assert len(set(part)) == 3
        assert (np.diff(part) != 0).mean() > 0.5


def test_order_is_pinned():
    """If this fails, the change alters the data of every existing run."""
    order = Order([1000, 700, 2, 1, 450], 16, 7, 2)
    assert order.windows_per_epoch == 63 + 44 + 1 + 0 + 29
    assert [order.window(g) for g in (0, 1, 136, 137, 10**12)] == [
        (0, 160, 17),
        (0, 176, 17),
        (1, 112, 17),
        (1, 688, 12),
        (0, 576, 17),
    ]


def test_a_split_without_windows_raises_a_clear_error():
    with pytest.raises(UserError, match="no shard with two tokens"):
        Order([1, 0, 1], 8, 0, 1)
