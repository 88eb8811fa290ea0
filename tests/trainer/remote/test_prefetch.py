"""Prefetched blocks: in the announced order, bounded, each once, never delaying a read."""

import os
import random
import shutil
import threading
import time

import pytest

from forescale.remote.store import Store
from tests.trainer.remote.hostile_server import HostileServer
from tests.trainer.remote.remote_files import QUICK, read
from tests.trainer.remote.test_cache import taken

BLOCK = 1 << 20
COUNT = 40
DATA = random.Random(2).randbytes(COUNT * BLOCK - 12_345)
THREADS = 8
AHEAD = 10  # blocks, a sixteenth of:
LIMIT = 16 * AHEAD * BLOCK


@pytest.fixture
def server():
    with HostileServer() as server:
        server.files["/d/a.tar"] = DATA
        yield server


@pytest.fixture
def opened(server, tmp_path):
    """Open a file of COUNT blocks, with a limit for its cache."""

    def open_one(limit=LIMIT):
        return Store(f"{server.url}/d", tmp_path / "cache", limit, QUICK).open(
            "a.tar", len(DATA), "v1"
        )

    yield open_one
    at_rest()


def announce(file, numbers, size=100):
    file.will_read([(number * BLOCK + 7, size) for number in numbers])


def read_block(file, number):
    start = number * BLOCK + 7
    assert read(file, start, start + 100) == DATA[start : start + 100]


def blocks_requested(server) -> list[int]:
    return [start // BLOCK for start, _ in server.requests("/d/a.tar")]


def at_rest() -> None:
    """Wait until no thread prefetches any more, because of the limit or because nothing is left."""
    deadline = time.monotonic() + 30
    while any(t.name == "prefetch" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def shuffled() -> list[int]:
    return random.Random(3).sample(range(COUNT), COUNT)


def test_announced_blocks_are_fetched_in_order_before_they_are_read(server, opened, monkeypatch):
    monkeypatch.setattr("forescale.remote.cache._THREADS", 2)
    file, order = opened(), shuffled()
    announce(file, order)
    at_rest()
    first = blocks_requested(server)
    assert sorted(first) == sorted(order[:AHEAD])
    # Blocks are taken in order. A thread may take any time, so that the other overtakes its block,
    # but only the one that the other thread holds can still be missing when a block is requested.
    for number in order[:AHEAD]:
        assert first.index(number) >= order.index(number) - 1
    server.always("/d/a.tar", 404)  # cached blocks need no server
    for number in order[:3]:
        file.read_at(number * BLOCK, memoryview(bytearray(10)))


def test_reading_in_the_announced_order_fetches_every_block_once(server, opened):
    file, order = opened(), shuffled()
    announce(file, order)
    for at, number in enumerate(order):
        read_block(file, number)
        ahead = len(set(blocks_requested(server)) - set(order[: at + 1]))
        assert ahead <= AHEAD + THREADS
    at_rest()
    assert sorted(blocks_requested(server)) == list(range(COUNT))


def test_memory_holds_only_the_blocks_being_fetched(server, opened):
    server.always("/d/a.tar", "wait")
    file = opened()
    announce(file, range(COUNT))
    for _ in range(THREADS):
        assert server.arrived.acquire(timeout=30)
    assert sum(t.name == "prefetch" for t in threading.enumerate()) == THREADS
    assert sorted(blocks_requested(server)) == list(range(THREADS))
    server.gate.set()
    at_rest()
    assert len(blocks_requested(server)) == AHEAD


def test_announcements_beyond_the_cache_evict_no_block_needed_next(server, tmp_path, opened):
    """A cache of 20 blocks, 40 announced; each is read twice, one after the other."""
    limit = 20 * (BLOCK + 8 * 16)
    file = opened(limit)
    announce(file, [n for n in range(COUNT) for _ in range(2)])
    for number in range(COUNT):
        for _ in range(2):
            read_block(file, number)
            at_rest()
            assert taken(tmp_path / "cache") <= limit
    assert sorted(blocks_requested(server)) == list(range(COUNT))


def test_cached_blocks_are_not_fetched_and_not_evicted(server, tmp_path, opened):
    """The oldest block is announced, and outlives those fetched afterwards."""
    file = opened(20 * (BLOCK + 8 * 16))
    for number in range(18):
        read_block(file, number)
    for path in (tmp_path / "cache").glob("*-0"):
        os.utime(path, (1000, 1000))
    announce(file, [0])
    at_rest()
    for number in range(18, 22):
        read_block(file, number)
    assert blocks_requested(server) == list(range(22))
    read_block(file, 0)
    assert blocks_requested(server) == list(range(22))


def test_a_read_does_not_queue_behind_prefetched_blocks(server, opened):
    server.next_time("/d/a.tar", *["wait"] * THREADS)
    file = opened()
    announce(file, range(COUNT))
    for _ in range(THREADS):
        assert server.arrived.acquire(timeout=30)
    read_block(file, 30)  # while all threads hang
    assert not server.gate.is_set()
    server.gate.set()
    at_rest()
    assert sorted(set(blocks_requested(server))) == sorted(blocks_requested(server))


def test_a_read_that_waited_for_a_failed_prefetch_tries_again(server, opened):
    server.next_time("/d/a.tar", "wait:404")
    file = opened()
    announce(file, [5])
    assert server.arrived.acquire(timeout=30)
    result = []
    reader = threading.Thread(target=lambda: result.append(read(file, 5 * BLOCK, 5 * BLOCK + 9)))
    reader.start()
    assert not server.arrived.acquire(timeout=0.1)  # time for a request to arrive
    server.gate.set()
    reader.join(30)
    assert result == [DATA[5 * BLOCK : 5 * BLOCK + 9]]
    assert blocks_requested(server) == [5, 5]


def test_threads_that_read_the_same_block_fetch_it_once(server, opened):
    file = opened()
    threads = [threading.Thread(target=read_block, args=(file, i % 4)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(blocks_requested(server)) == [0, 1, 2, 3]


def test_a_failed_prefetch_is_tried_again_by_its_read(server, opened):
    server.next_time("/d/a.tar", 404)
    file = opened()
    announce(file, [7])
    at_rest()
    read_block(file, 7)
    assert blocks_requested(server) == [7, 7]


def test_skipped_blocks_do_not_stop_prefetching(server, opened):
    file = opened()
    announce(file, range(COUNT))
    at_rest()
    read_block(file, 30)  # the reader skipped ahead: the prefetched blocks are never read
    at_rest()
    assert set(blocks_requested(server)) == {*range(2 * AHEAD), 30}


def test_a_cache_that_stores_nothing_stops_prefetching(server, opened, tmp_path):
    file = opened()
    shutil.rmtree(tmp_path / "cache")
    with pytest.warns(RuntimeWarning, match="the cache of remote files failed"):
        read_block(file, 0)
    announce(file, range(1, COUNT))
    at_rest()
    assert blocks_requested(server) == [0]
