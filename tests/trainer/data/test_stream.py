"""The stream: one sequence of windows for every world size, number of workers and resume point."""

import threading
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.data.dataset import Dataset
from forescale.data.feed import Feed, window_hash
from forescale.data.mixture import Mixture, MixtureStage
from forescale.data.objective import IGNORED
from forescale.data.order import Order
from forescale.data.stream import StepShare, stream, validation_windows
from forescale.ground.errors import UserError
from tests.trainer.data.small_dataset import END, write_dataset


def make_feed(splits, L, seed, block, stages=None, bins=None, **options) -> Feed:
    orders = {
        name: Order(s.shard_tokens, L, seed, block, bins and bins[name])
        for name, s in splits.items()
    }
    stages = stages or [MixtureStage.of(0, [1] * len(splits))]
    return Feed(splits, Mixture(orders, stages, seed), 257, seed=seed, bins=bins, **options)


@pytest.fixture(scope="module")
def split(dataset):
    return Dataset(dataset).split("train")


@pytest.fixture
def feed(split):
    return make_feed({"data": split}, 64, 3, 2)


def collect(feed, steps, g, world, batch, micro, workers=1, windows=None):
    """Return for steps [a, b) on all ranks: the first rank's batch, the micro-batches, the hash."""
    options = {"workers": workers, "windows": windows}
    ranks = [
        list(stream(feed, StepShare(batch, micro, r, world), range(*steps), g, **options))
        for r in range(world)
    ]
    rows = []
    for batches in zip(*ranks, strict=True):
        assert len({(x.step, x.g0, x.g1, x.targets) for x in batches}) == 1
        micros = [m for x in batches for m in x.micro]
        size = windows(batches[0].step) if windows else batch
        assert [m.index for m in micros] == list(range(size // micro))
        real = [m.targets != IGNORED for m in micros]
        if feed.unit == "preference":
            assert sum(int(rows.any(1).sum()) for rows in real) == 2 * batches[0].targets
        else:
            assert sum(int(rows.sum()) for rows in real) == batches[0].targets
        rows.append((batches[0], micros, sum(x.window_hash for x in batches) % 2**64))
    return rows


documents = st.lists(st.integers(1, 90), min_size=1, max_size=6)
shards = st.lists(documents, min_size=1, max_size=5).filter(lambda s: max(map(sum, s)) > 1)


@given(
    sources=st.lists(shards, min_size=1, max_size=3),
    L=st.integers(1, 120),
    seed=st.integers(0, 99),
    block=st.integers(1, 4),
    micro=st.integers(1, 3),
    chain=st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=4
    ),
    first=st.integers(0, 10**12),
    skips=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=2),
    later=st.integers(1, 30),
)
@settings(max_examples=8, deadline=None)
def test_any_chain_of_restarts_reads_one_sequence(
    sources, L, seed, block, micro, chain, first, skips, later
):
    """World size, workers and resume points change; windows, order and hashes don't."""
    with TemporaryDirectory() as folder:
        splits = {
            f"s{i}": Dataset(write_dataset(Path(folder, str(i)), s)).split("train")
            for i, s in enumerate(sources)
        }
        stages = [MixtureStage.of(0, [1 + i for i in range(len(splits))])]
        stages.append(MixtureStage.of(first + later, [1] * len(splits)))
        skipped, end = [], first
        for gap, size in skips:
            skipped.append((end + gap, end + gap + size))
            end += gap + size
        feed = make_feed(splits, L, seed, block, stages, skipped=skipped)
        batch = 12 * micro
        total = sum(steps for _, _, steps in chain)
        whole = collect(feed, (7, 7 + total), first, 1, batch, micro, workers=0)

        samples = [s for s in range(first, whole[-1][0].g1) if not _in(skipped, s)]
        assert len(samples) == total * batch
        windows = [w for _, micros, _ in whole for w in _windows(micros)]
        for g, got in zip(samples, windows, strict=True):
            places = feed.mixture.places(g, g + 1)
            source, *place = (int(column[0]) for column in places)
            assert got == feed.splits[source].read(*place).tolist()

        step, g, parts = 7, first, []
        for world, workers, steps in chain:
            parts += collect(feed, (step, step + steps), g, world, batch, micro, workers)
            step, g = step + steps, parts[-1][0].g1
        for (a, found_a, hash_a), (b, found_b, hash_b) in zip(whole, parts, strict=True):
            assert (a.step, a.g0, a.g1, a.shares, hash_a) == (b.step, b.g0, b.g1, b.shares, hash_b)
            for x, y in zip(found_a, found_b, strict=True):
                assert torch.equal(x.tokens, y.tokens)
                assert torch.equal(x.targets, y.targets)


@given(
    splits=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=2, max_size=4),
    skip=st.integers(0, 60),
)
@settings(max_examples=8, deadline=None)
def test_a_growing_batch_is_one_sequence_at_any_ranks_and_restarts(split, splits, skip):
    skipped = [(skip, skip + 5)]
    feed = make_feed({"data": split}, 16, 3, 2, skipped=skipped)
    sizes = [12, 12, 24, 24, 24, *[48] * 8]
    total = sum(steps for _, steps in splits)
    share = (1, 48, 2, 0, sizes.__getitem__)
    whole = collect(feed, (0, total), 0, *share)
    read = [s for s in range(whole[-1][0].g1 if whole else 0) if not _in(skipped, s)]
    assert len(read) == sum(sizes[:total])
    parts, step = [], 0
    for world, steps in splits:
        g = parts[-1][0].g1 if parts else 0
        parts += collect(feed, (step, step + steps), g, world, *share[1:])
        step += steps
    for (a, found_a, hash_a), (b, found_b, hash_b) in zip(whole, parts, strict=True):
        assert (a.step, a.g0, a.g1, a.shares, hash_a) == (b.step, b.g0, b.g1, b.shares, hash_b)
        assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(found_a, found_b, strict=True))


def _in(intervals, sample) -> bool:
    return any(a <= sample < b for a, b in intervals)


def _windows(micros):
    """Return the windows of micro-batches, joined again from inputs and targets."""
    for m in micros:
        for inputs, targets in zip(m.tokens.tolist(), m.targets.tolist(), strict=True):
            real = [t for t in targets if t != IGNORED]
            assert inputs[1 : len(real)] == real[:-1]
            assert not any(inputs[len(real) :])
            yield [inputs[0], *real]


def test_shares_of_a_step_are_its_targets_by_source(tmp_path):
    splits = {
        name: Dataset(write_dataset(tmp_path / name, [[40] * 9])).split("train") for name in "ab"
    }
    feed = make_feed(splits, 16, 0, 1, [MixtureStage.of(0, [3, 1])])
    rows = collect(feed, (0, 128), 0, 2, 8, 2)
    total = {name: sum(b.shares[name] for b, _, _ in rows) for name in "ab"}
    windows = feed.mixture.samples(1024)
    assert windows.tolist() == [768, 256]
    for i, name in enumerate("ab"):
        assert total[name] == feed.mixture.orders[i].targets(0, int(windows[i]))


def test_documents_are_numbered_within_their_window(tmp_path):
    split = Dataset(write_dataset(tmp_path / "d", [[5, 9, 1, 30, 3]])).split("train")
    feed = make_feed({"data": split}, 12, 0, 1, documents=True)
    for _, micros, _ in collect(feed, (0, 4), 0, 1, 1, 1):
        (m,) = micros
        for tokens, numbers in zip(m.tokens.tolist(), m.documents.tolist(), strict=True):
            number = 0
            for token, got in zip(tokens, numbers, strict=True):
                assert got == number
                number += token == END


def test_hash_depends_on_g_and_tokens():
    tokens = np.arange(9, dtype=np.uint16)
    assert window_hash(3, tokens) != window_hash(4, tokens)
    assert window_hash(3, tokens) != window_hash(3, tokens[:-1])
    assert window_hash(3, tokens) != window_hash(3, tokens[::-1].copy())
    assert 0 <= window_hash(2**62, tokens) < 2**64


class Watched:
    """A split that counts its reads, and fails or waits from the n-th on."""

    def __init__(self, split, good, then=None):
        self._split, self.left, self.reads, self._then = split, good, 0, then

    def __getattr__(self, name):
        return getattr(self._split, name)

    def shard(self, number):
        return WatchedShard(self, self._split.shard(number))

    def count(self):
        self.reads += 1
        if self.reads > self.left:
            self._then()

    def read_into(self, *place):
        self.count()
        self._split.read_into(*place)


class WatchedShard:
    def __init__(self, owner, shard):
        self._owner, self._shard = owner, shard

    def read_rows(self, rows, starts, out):
        for row, start in zip(rows, starts, strict=True):
            self._owner.count()
            self._shard.read_rows([row], [start], out)


def fail():
    raise UserError("train-000000.tar", "is damaged", "restore it")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_is_raised_at_its_own_step(split, workers):
    feed = make_feed({"data": Watched(split, 12, fail)}, 32, 0, 2)
    batches = stream(feed, StepShare(4, 4), range(100), 0, workers=workers)
    if workers < 2:  # several workers share the count, so the failing one isn't fixed
        assert [next(batches).step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="is damaged"):
        list(batches)


@pytest.mark.parametrize("workers", [1, 2])
def test_prefetching_is_bounded_and_ends_with_the_consumer(split, workers):
    watched = Watched(split, 10**9)
    feed = make_feed({"data": watched}, 32, 0, 2)
    before = threading.active_count()
    with closing(stream(feed, StepShare(4, 4), range(10**9), 0, workers=workers)) as batches:
        next(batches)
        threading.Event().wait(0.3)
        assert watched.reads <= 4 * (1 + 2 + workers)
    deadline = threading.Event()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        deadline.wait(0.05)
    assert threading.active_count() <= before


def test_a_stalled_worker_is_logged_with_its_shard(split, monkeypatch):
    monkeypatch.setattr("forescale.data.pipeline._STALLED", 0.2)
    release, heard = threading.Event(), []
    feed = make_feed({"web": Watched(split, 4, release.wait)}, 32, 0, 2)

    def log(sentence):
        heard.append(sentence)
        if len(heard) == 2:
            release.set()

    batches = stream(feed, StepShare(4, 4), range(3), 0, log=log)
    assert len(list(batches)) == 3
    assert "data worker 0 has been reading train-00000" in heard[0]
    assert "of web for" in heard[0]


def test_an_indivisible_batch_is_refused():
    for batch, micro, world in ((6, 4, 1), (8, 4, 3)):
        with pytest.raises(UserError, match="global_batch"):
            StepShare(batch, micro, 0, world)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("limit", [None, 1, 7])
def test_validation_windows_cover_the_split_evenly(dataset, world, limit):
    split, L, size = Dataset(dataset).split("validation"), 50, 4
    ranks = [list(validation_windows(split, L, size, r, world, limit)) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1
    every = sorted((m for r in ranks for m in r), key=lambda m: m.index)
    assert [m.index for m in every] == list(range(len(every)))
    places = [
        (shard, start, min(L + 1, tokens - start))
        for shard, tokens in enumerate(split.shard_tokens)
        for start in range(0, tokens - 1, L)
    ]
    chosen = places if limit is None else [places[i * len(places) // limit] for i in range(limit)]
    micros = [w for w in _windows(every) if len(w) > 1]
    assert micros == [split.read(*place).tolist() for place in chosen]


@pytest.mark.parametrize("documents", [False, True])
def test_shorter_rows_hold_the_windows_of_whole_ones(split, documents):
    feed, share = make_feed({"data": split}, 64, 3, 2, documents=documents), StepShare(4, 2)
    (whole,) = stream(feed, share, range(1), 0)
    (cut,) = stream(feed, share, range(1), 0, length=lambda step: 16)
    assert (cut.g1, cut.targets, cut.window_hash) == (whole.g1, whole.targets, whole.window_hash)
    for short, long in zip(cut.micro, whole.micro, strict=True):
        for name in ("tokens", "targets", "documents"):
            rows, windows = getattr(short, name), getattr(long, name)
            if windows is None:
                assert rows is None
                continue
            assert rows.shape == (8, 16)
            assert torch.equal(rows.view(2, 64), windows)
