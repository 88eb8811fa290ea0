"""The stream: one sequence of windows for every world size and resume point."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.order import Order
from trainer.data.shards import Dataset
from trainer.data.stream import IGNORED, stream, validation_windows, window_hash
from trainer.errors import UserError


@pytest.fixture(scope="module")
def split(dataset):
    return Dataset(dataset).split("train")


def collect(split, order, steps, world, global_batch, micro_batch, first=None):
    """Steps [a, b) on all ranks: per step the micro-batches by index, targets, summed hash."""
    a, b = steps
    ranks = [
        list(stream(split, order, a, global_batch, micro_batch, r, world, b, first))
        for r in range(world)
    ]
    rows = []
    for batches in zip(*ranks, strict=True):
        assert len({(x.step, x.g0, x.g1, x.targets) for x in batches}) == 1
        micro = [m for x in batches for m in x.micro]
        assert [m.index for m in micro] == list(range(global_batch // micro_batch))
        real = sum(int((m.targets != IGNORED).sum()) for m in micro)
        assert real == batches[0].targets
        rows.append((batches[0], micro, sum(x.window_hash for x in batches) % 2**64))
    return rows


@given(
    L=st.integers(1, 700),
    seed=st.integers(0, 99),
    block=st.integers(1, 4),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    micro=st.integers(1, 3),
    resume=st.integers(0, 4),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_same_windows_for_any_world_size_and_resume(split, L, seed, block, worlds, micro, resume):
    order, batch = Order(split.shard_tokens, L, seed, block), 12 * micro
    whole = collect(split, order, (0, 4), worlds[0], batch, micro)
    tail = collect(split, order, (resume, 4), worlds[1], batch, micro)
    assert len(tail) == 4 - resume
    for (a, micro_a, hash_a), (b, micro_b, hash_b) in zip(whole[resume:], tail, strict=True):
        assert (a.step, a.g0, a.g1, hash_a) == (b.step, b.g0, b.g1, hash_b)
        for x, y in zip(micro_a, micro_b, strict=True):
            assert torch.equal(x.tokens, y.tokens)
            assert torch.equal(x.targets, y.targets)


def test_batches_hold_the_windows_of_the_order(split):
    L = 64
    order = Order(split.shard_tokens, L, 3, 2)
    for batch, micro, digest in collect(split, order, (5, 25), 2, 8, 2):
        assert (batch.g0, batch.g1) == (batch.step * 8, batch.step * 8 + 8)
        want = 0
        for g in range(batch.g0, batch.g1):
            window = split.read(*order.window(g))
            m, row = micro[(g - batch.g0) // 2], (g - batch.g0) % 2
            n = len(window) - 1
            assert m.tokens.dtype == m.targets.dtype == torch.int64
            assert m.tokens.shape == m.targets.shape == (2, L)
            assert m.tokens[row, :n].tolist() == window[:-1].tolist()
            assert m.targets[row].tolist() == window[1:].tolist() + [IGNORED] * (L - n)
            want += window_hash(g, window)
        assert digest == want % 2**64


def test_an_epoch_of_batches_has_every_target_once(split):
    order = Order(split.shard_tokens, 50, 0, 2)
    n = order.windows_per_epoch
    rows = collect(split, order, (0, n), 1, 1, 1)
    seen = torch.cat([m.targets[m.targets != IGNORED] for _, micro, _ in rows for m in micro])
    want = np.concatenate([split.read(s, 1, t - 1) for s, t in enumerate(split.shard_tokens)])
    assert (np.bincount(seen.numpy()) == np.bincount(want)).all()


def test_a_branch_keeps_its_g(split):
    order = Order(split.shard_tokens, 32, 0, 2)
    (batch, micro, _), *_ = collect(split, order, (10, 12), 2, 6, 3, first=1001)
    assert (batch.step, batch.g0, batch.g1) == (10, 1001, 1007)
    assert micro[0].tokens[0].tolist()[:5] == split.read(*order.window(1001))[:5].tolist()


def test_hash_depends_on_g_and_tokens_but_not_on_the_storage_type():
    tokens = np.arange(9, dtype=np.uint16)
    assert window_hash(3, tokens) == window_hash(3, tokens.astype(np.uint32))
    assert window_hash(3, tokens) != window_hash(4, tokens)
    assert window_hash(3, tokens) != window_hash(3, tokens[:-1])
    assert 0 <= window_hash(2**62, tokens) < 2**64


class Faulty:
    """A split that fails from its n-th read on."""

    def __init__(self, split, good):
        self._split, self.left, self.reads = split, good, 0

    def read(self, *place):
        self.reads += 1
        if self.reads > self.left:
            raise UserError("train-000000.tar", "is damaged", "restore it")
        return self._split.read(*place)


def prefetchers() -> int:
    return sum(t.name == "prefetch" for t in threading.enumerate())


def test_a_fault_surfaces_at_its_step_and_not_before(split):
    order = Order(split.shard_tokens, 32, 0, 2)
    batches = stream(Faulty(split, 12), order, 0, 4, 4, 0, 1, 100)
    assert [next(batches).step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="is damaged"):
        next(batches)
    assert prefetchers() == 0


def test_prefetch_is_bounded_and_closing_ends_the_thread(split):
    order, source = Order(split.shard_tokens, 32, 0, 2), Faulty(split, 10**9)
    batches = stream(source, order, 0, 4, 4, 0, 1, 10**9)
    next(batches)
    next(batches)
    threading.Event().wait(0.3)
    assert source.reads == 4 * 4  # two taken, two ready
    assert prefetchers() == 1
    batches.close()
    assert prefetchers() == 0


def test_a_batch_that_does_not_divide_has_a_sentence(split):
    order = Order(split.shard_tokens, 32, 0, 2)
    for global_batch, micro_batch, world in ((10, 4, 1), (8, 4, 3)):
        with pytest.raises(UserError, match="don't divide"):
            stream(split, order, 0, global_batch, micro_batch, 0, world, 1)


@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize("world", [1, 3])
def test_validation_windows_cover_the_split_in_order(dataset, world, limit):
    split, L, size = Dataset(dataset).split("validation"), 50, 4
    ranks = [list(validation_windows(split, L, size, r, world, limit)) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1  # ranks stay together
    micro = sorted((m for r in ranks for m in r), key=lambda m: m.index)
    assert [m.index for m in micro] == list(range(len(micro)))
    assert all(m.tokens.shape == (size, L) for m in micro)
    seen = torch.cat([m.targets[m.targets != IGNORED] for m in micro])
    want = np.concatenate([split.read(s, 1, t - 1) for s, t in enumerate(split.shard_tokens)])
    assert seen.tolist() == want.tolist()[: None if limit is None else limit * L]
