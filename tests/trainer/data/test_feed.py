"""Continuing despite damage: windows are substituted, the same on all ranks, and everything is
reported."""

import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from forescale.data.dataset import Damaged, Dataset
from forescale.data.feed import LostMember
from forescale.data.stream import StepShare, stream
from forescale.ground import errors
from forescale.ground.errors import CRASHED, Transient, UserError
from tests.trainer.data.small_dataset import flip, write_dataset
from tests.trainer.data.test_stream import make_feed

L, STEPS, BATCH = 16, range(40), 12


@pytest.fixture
def path(tmp_path):
    return write_dataset(tmp_path / "d", [[50, 60, 91], [40] * 6, [129]], member=64)


def damage(path, shard, member):
    """Flip a byte in the middle of a member's tokens."""
    damaged = Dataset(path).split("train").shard(shard).members[member]
    flip(path / f"train-{shard:06d}.tar", damaged.tok["offset"] + damaged.tok["size"] // 2)
    return LostMember("data", shard, damaged.key)


def feed_of(path, substitute=True, **options):
    split = Dataset(path).split("train")
    return make_feed({"data": split}, L, 5, 2, substitute=substitute, **options)


def run(path, world=1, workers=1, quarantine=frozenset(), steps=STEPS):
    """Return all ranks' batches by step, with ranks as threads that agree like real ranks."""
    barrier, lost_by_rank = threading.Barrier(world), [frozenset()] * world

    def rank(number):
        def agree(mine):
            lost_by_rank[number] = mine
            barrier.wait(20)
            damaged = frozenset().union(*lost_by_rank)
            barrier.wait(20)
            return damaged

        share = StepShare(BATCH, BATCH // 12, number, world)
        feed = feed_of(path)  # each rank verifies its own reads
        known = {"quarantine": quarantine, "agree": agree if world > 1 else None}
        g = steps[0] * BATCH
        return list(stream(feed, share, steps, g, workers=workers, **known))

    with ThreadPoolExecutor(world) as pool:
        ranks = list(pool.map(rank, range(world)))
    return list(zip(*ranks, strict=True))


def sequence(rows):
    return [(m.tokens.tolist(), m.targets.tolist()) for row in rows for b in row for m in b.micro]


def test_damage_raises_by_default_and_names_file_and_member(path):
    lost = damage(path, 1, 2)
    feed = feed_of(path, substitute=False)
    with pytest.raises(Damaged, match=rf"train-000001.tar: member {lost.member} is damaged"):
        list(stream(feed, StepShare(BATCH, 1), STEPS, 0))


def test_only_damaged_windows_are_substituted(path):
    whole = sequence(run(path))
    rows = run(path)
    lost = damage(path, 1, 2)
    rows = run(path)
    touched = 0
    for g, (before, after) in enumerate(zip(whole, sequence(rows), strict=True)):
        _, shard, start, length = (int(c[0]) for c in feed_of(path).mixture.places(g, g + 1))
        members = feed_of(path).splits[0].members(shard, start, length)
        hit = shard == 1 and lost.member in members
        touched += hit
        assert (before == after) != hit
        real = [sum(t >= 0 for t in row) for _, (row,) in (before, after)]
        assert real[0] == real[1]  # the number of targets per step doesn't change
    assert touched
    assert rows[-1][0].quarantine == {lost}
    assert sum(bool(b.lost) for (b,) in rows) == 1


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_agree_on_damage_from_the_step_that_finds_it(path, world, workers):
    lost = {damage(path, 1, 2), damage(path, 0, 0)}
    alone, shared = run(path), run(path, world, workers)
    assert sequence(alone) == sequence(shared)
    for (one,), ranks in zip(alone, shared, strict=True):
        assert {b.quarantine for b in ranks} == {one.quarantine}
        assert sum(b.window_hash for b in ranks) % 2**64 == one.window_hash
        assert frozenset().union(*(b.lost for b in ranks)) == one.lost
    assert alone[-1][0].quarantine == lost


def test_a_resumed_run_knows_what_was_lost(path):
    damage(path, 1, 2)
    damage(path, 2, 1)
    whole = run(path)
    for cut in (1, 7, 20):
        known = whole[cut - 1][0].quarantine
        tail = run(path, 2, 1, known, range(cut, 40))
        assert sequence(tail) == sequence(whole)[cut * BATCH :]


def test_a_quarantined_member_stays_lost_even_after_repair(path):
    copy = {f.name: f.read_bytes() for f in path.iterdir()}
    damage(path, 1, 2)
    whole = run(path)
    for name, raw in copy.items():
        (path / name).write_bytes(raw)
    tail = run(path, quarantine=whole[-1][0].quarantine, steps=range(20, 40))
    assert sequence(tail) == sequence(whole)[20 * BATCH :]


def test_a_truncated_shard_is_lost_completely(path):
    tar = path / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    rows = run(path, 2)
    assert rows[-1][0].quarantine == {LostMember("data", 1, "")}
    assert len(sequence(rows)) == 40 * BATCH


def test_windows_with_damaged_document_ends_are_substituted_too(path):
    damaged = Dataset(path).split("train").shard(1).members[1]
    flip(path / "train-000001.tar", damaged.doc["offset"])
    feed = feed_of(path, documents=True)
    rows = list(stream(feed, StepShare(BATCH, 1), STEPS, 0))
    assert rows[-1].quarantine == {LostMember("data", 1, damaged.key)}
    with pytest.raises(Damaged, match="document ends"):
        list(stream(feed_of(path, False, documents=True), StepShare(BATCH, 1), STEPS, 0))


def test_a_source_with_nothing_left_raises_a_clear_error(tmp_path):
    path = write_dataset(tmp_path / "d", [[200]], member=64)
    for member in range(4):
        damage(path, 0, member)
    with pytest.raises(UserError, match="substitutes in a row touch damaged members"):
        list(stream(feed_of(path), StepShare(BATCH, 1), range(3), 0, workers=0))


def test_a_window_reads_only_what_it_needs(tmp_path):
    """At the start and far into the run: resuming reads only the chunks of its windows."""
    path = write_dataset(tmp_path / "d", [[200_000] * 3] * 4, member=1 << 18)
    for g in (0, 10**12):
        split = Dataset(path).split("train")
        read = []
        for number in range(4):
            shard = split.shard(number)
            file = shard.file

            class Counting:
                size, close, forget = file.size, file.close, file.forget

                def read_at(self, offset, into, read_at=file.read_at, read=read):
                    read.append(len(into))
                    read_at(offset, into)

            shard.file = Counting()
            shard._read_at = shard.file.read_at
        feed = make_feed({"data": split}, 256, 0, 2)
        list(stream(feed, StepShare(8, 1), range(5, 6), g, workers=0))
        assert 0 < sum(read) <= 8 * 2 * 65536
        assert np.mean(read) <= 65536


@pytest.fixture
def without_pauses(monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", (0.0, 0.0))


@contextmanager
def no_more_files():
    """Take away this process's right to open another file: EMFILE from the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.filterwarnings("ignore:.*next try")
@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_fails_to_open_a_shard_puts_nothing_away(path, without_pauses, workers):
    """With substitutes allowed, each shard fails once, all are read afterwards."""
    feed, want = feed_of(path), sequence(run(path))
    with no_more_files(), pytest.raises(Transient, match=r"train-00000\d") as caught:
        list(stream(feed, StepShare(BATCH, 1), STEPS, 0, workers=workers))
    assert "Too many open files) (tried 3 times)" in str(caught.value)
    assert caught.value.code == CRASHED
    rows = [(batch,) for batch in stream(feed, StepShare(BATCH, 1), STEPS, 0, workers=workers)]
    assert sequence(rows) == want
    assert not any(batch.quarantine for (batch,) in rows)


@pytest.mark.filterwarnings("ignore:.*next try")
def test_a_stale_handle_is_opened_again_and_its_tokens_are_read(path, without_pauses):
    """As a file server that restarted: the open file gives an I/O error, its path works."""
    feed, want = feed_of(path), sequence(run(path))
    for number in range(3):
        fd = feed.splits[0].shard(number).file._fd
        with open("/proc/self/mem", "rb") as broken:  # the kernel answers EIO below address 4096
            os.dup2(broken.fileno(), fd)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, 1, 0)
    rows = [(batch,) for batch in stream(feed, StepShare(BATCH, 1), STEPS, 0)]
    assert sequence(rows) == want
    assert not any(batch.lost for (batch,) in rows)


@pytest.mark.filterwarnings("ignore:.*next try")
def test_a_file_system_that_is_gone_is_no_damage_but_a_file_that_is_gone_is(path, without_pauses):
    feed = feed_of(path)
    moved = path.rename(path.with_name("elsewhere"))
    for left in (False, True):  # the place where it was mounted is there, and empty
        if left:
            path.mkdir()
        with pytest.raises(Transient, match=r"folder is gone or empty \(tried 3 times\)"):
            list(stream(feed, StepShare(BATCH, 1), STEPS, 0))
    path.rmdir()
    moved.rename(path)
    (path / "train-000002.tar").unlink()
    rows = list(stream(feed, StepShare(BATCH, 1), STEPS, 0))
    assert rows[-1].quarantine == {LostMember("data", 2, "")}


def test_a_shard_that_may_not_be_read_is_no_damage(path, without_pauses):
    feed = feed_of(path)
    (path / "train-000001.tar").unlink()
    (path / "train-000001.tar").symlink_to("train-000001.tar")  # ELOOP, for root too
    with pytest.raises(UserError, match=r"train-000001\.tar: can't be read") as caught:
        list(stream(feed, StepShare(BATCH, 1), STEPS, 0))
    assert not isinstance(caught.value, Damaged | Transient)
