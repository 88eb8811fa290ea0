"""The node's cache: correct bytes whatever happens to its files, within its limit, shared by
processes, of which some are killed."""

import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from forescale.ground.errors import UserError
from forescale.remote.cache import BlockCache
from forescale.remote.store import Store
from tests.disks import fill, make_read_only, small_disk
from tests.trainer.remote.remote_files import DATA, QUICK, read, sentence, serving

FILE = "0123456789abcdef" * 2  # part of a block's name that stands for its file
BLOCK = 10_000
STORED = BLOCK + 8  # including its checksum


class Blocks:
    """Blocks of `length` bytes, the same for every reader. fetched: numbers of the blocks
    fetched."""

    def __init__(self, directory: Path, limit: int = 1 << 20, length: int = BLOCK):
        self.cache, self.length = BlockCache(directory, limit), length
        self.fetched: list[int] = []

    def origin(self, number: int) -> bytes:
        return random.Random(number).randbytes(self.length)

    def get(self, number: int, skip: int = 0, stop: int | None = None) -> bytes:
        """Read a block like forescale.remote.cache does."""
        name = f"{FILE}-{number}"
        data = bytearray((self.length if stop is None else stop) - skip)
        if self.cache.read(name, self.length, skip, memoryview(data)):
            return bytes(data)

        def fetch() -> bytearray:
            self.fetched.append(number)
            return bytearray(self.origin(number))

        return bytes(self.cache.fill(name, self.length, fetch, 60)[skip:stop])


def taken(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.iterdir() if p.name != "usage")


@pytest.fixture
def blocks(tmp_path):
    return Blocks(tmp_path / "cache")


def path_of(blocks: Blocks, number: int) -> Path:
    return Path(blocks.cache._directory) / f"{FILE}-{number}"


def age(blocks: Blocks, *numbers: int) -> None:
    """Make these blocks look read long ago, the first one longest."""
    for i, number in enumerate(numbers):
        os.utime(path_of(blocks, number), (1000 + i, 1000 + i))


def test_a_block_is_fetched_once_and_read_at_any_offset(blocks):
    whole = blocks.origin(3)
    for skip, stop in [(0, BLOCK), (0, 1), (17, 4711), (BLOCK - 1, BLOCK)]:
        assert blocks.get(3, skip, stop) == whole[skip:stop]
    assert blocks.fetched == [3]
    again = Blocks(Path(blocks.cache._directory))  # another process, another day
    assert again.get(3) == whole
    assert again.fetched == []


def test_a_part_of_a_block_is_verified_by_its_own_pieces(tmp_path):
    """A block of several pieces: reads at their borders, and damage in one of them."""
    blocks = Blocks(tmp_path, length=200_000)
    whole = blocks.get(0)
    for skip, stop in [(65_535, 65_537), (65_536, 131_072), (0, 200_000), (199_999, 200_000)]:
        assert blocks.get(0, skip, stop) == whole[skip:stop]
    flip(path_of(blocks, 0), 70_000)
    assert blocks.get(0, 0, 65_536) == whole[:65_536]
    assert blocks.fetched == [0]
    assert blocks.get(0, 65_536, 65_537) == whole[65_536:65_537]
    assert blocks.fetched == [0, 0]


# -- damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda p, at=at: flip(p, at) for at in (0, 1, 4999, BLOCK - 1, BLOCK, BLOCK + 7)),
        *(lambda p, at=at: os.truncate(p, at) for at in (0, 1, 5000, BLOCK, BLOCK + 7)),
        lambda p: p.write_bytes(bytes(STORED)),
        lambda p: p.write_bytes(p.read_bytes() + b"x"),
        lambda p: p.write_bytes(p.with_name(f"{FILE}-1").read_bytes()),  # another block's
    ],
)
def test_damaged_blocks_are_fetched_again(blocks, damage):
    blocks.get(0), blocks.get(1)
    damage(path_of(blocks, 0))
    assert blocks.get(0) == blocks.origin(0)
    assert blocks.fetched == [0, 1, 0]
    assert blocks.get(0) == blocks.origin(0)
    assert blocks.fetched == [0, 1, 0]


# -- the limit


def test_the_blocks_stay_within_the_limit(tmp_path):
    limit = 12 * STORED + 100
    blocks = Blocks(tmp_path, limit)
    rng = random.Random(5)
    for _ in range(200):
        number = rng.randrange(40)
        assert blocks.get(number) == blocks.origin(number)
        assert taken(tmp_path) <= limit
    assert taken(tmp_path) >= 0.8 * limit
    assert int.from_bytes((tmp_path / "usage").read_bytes(), "little") == taken(tmp_path)


def test_the_least_recently_read_block_is_evicted_first(tmp_path):
    blocks = Blocks(tmp_path, 4 * STORED)
    for number in range(4):
        blocks.get(number)
    age(blocks, 1, 0, 3, 2)
    blocks.get(1)  # now the youngest
    assert blocks.cache.keep(f"{FILE}-0", BLOCK)  # a block that will be read counts as read now
    blocks.get(4)
    assert {p.name[33:] for p in tmp_path.glob(f"{FILE}-*")} == {"0", "1", "2", "4"}


def test_a_block_read_before_the_clock_was_put_back_is_not_there_for_ever(tmp_path):
    blocks = Blocks(tmp_path, 4 * STORED)
    for number in range(4):
        blocks.get(number)
    for number in range(3):
        os.utime(path_of(blocks, number), (4e9, 4e9))
    blocks.get(0)  # read since
    for number in (4, 5):
        blocks.get(number)
    assert {p.name[33:] for p in tmp_path.glob(f"{FILE}-*")} == {"0", "3", "4", "5"}


def test_a_smaller_limit_applies_at_once(tmp_path):
    blocks = Blocks(tmp_path, 10 * STORED)
    for number in range(10):
        blocks.get(number)
    age(blocks, *range(10))
    BlockCache(tmp_path, 3 * STORED)
    assert taken(tmp_path) == 3 * STORED
    assert blocks.get(9) == blocks.origin(9)
    assert blocks.fetched == list(range(10))


@pytest.mark.parametrize("lost", [b"", b"\xff" * 8])
def test_lost_usage_is_counted_again(tmp_path, lost):
    blocks = Blocks(tmp_path, 5 * STORED)
    for number in range(5):
        blocks.get(number)
    (tmp_path / "usage").write_bytes(lost)
    for number in range(5, 30):
        blocks.get(number)
        assert taken(tmp_path) <= 5 * STORED
    assert taken(tmp_path) >= 4 * STORED


# -- disks that fail


def fails(blocks: Blocks, numbers: range) -> list[str]:
    """Read all of these blocks; return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in numbers:
            assert blocks.get(number) == blocks.origin(number)
    return [str(w.message) for w in caught]


def test_a_full_disk_gives_a_warning(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        blocks = Blocks(disk / "cache", length=100_000)
        blocks.get(0)
        filling = fill(disk)
        [warning] = fails(blocks, range(20))
        assert f"{disk}/cache: the cache of remote files failed (No space left" in warning
        assert blocks.cache.failing
        assert blocks.fetched == list(range(20))  # the first one is still there
        filling.unlink()
        assert fails(blocks, range(20, 22)) == []
        assert not blocks.cache.failing
        fetched = len(blocks.fetched)
        blocks.get(21)
        assert len(blocks.fetched) == fetched


def test_a_cache_never_fills_the_whole_disk(tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        blocks = Blocks(disk / "cache", limit=1 << 40, length=100_000)
        assert fails(blocks, range(50)) == []
        assert shutil.disk_usage(disk).free > 100_000


def test_a_disk_that_becomes_read_only_gives_a_warning(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        blocks = Blocks(disk / "cache")
        blocks.get(0)
        make_read_only(disk)
        [warning] = fails(blocks, range(5))
        assert "Read-only file system" in warning


def test_an_unusable_cache_is_reported(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    problem = r"file/cache: can't be used as cache of remote files"
    with pytest.raises(UserError, match=problem) as caught:
        Store("http://127.0.0.1:1/d", tmp_path / "file" / "cache", 1 << 20, QUICK)
    assert re.search("set data.cache to", sentence(caught))


def test_a_block_that_a_dataset_finds_damaged_is_not_kept(tmp_path):
    """`forget` is called if a checksum of the dataset is wrong."""
    with serving() as server:
        server.files["/d/a.tar"] = DATA[::-1]
        server.etags["/d/a.tar"] = "always"
        file = Store(f"{server.url}/d", tmp_path, 1 << 26, QUICK).open("a.tar", len(DATA), "v")
        assert read(file) == DATA[::-1]
        server.files["/d/a.tar"] = DATA
        assert file.forget(1 << 20, 10)
        whole = read(file)
        assert whole[1 << 20 : 2 << 20] == DATA[1 << 20 : 2 << 20]
        assert whole[: 1 << 20] == DATA[::-1][: 1 << 20]


ROOT = Path(__file__).parents[4]


DIES = """
import os, signal, sys
from forescale.remote.cache import BlockCache
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
def half(fd, parts, at):
    os.pwrite(fd, parts[0][: len(parts[0]) // 2], at)
    die()
when, directory, name = sys.argv[1:]
if when == "write":
    os.pwritev = half
elif when == "rename":
    os.rename = die
else:
    rename = os.rename
    os.rename = lambda *args: (rename(*args), die())
cache = BlockCache(directory, 1 << 20)
cache.fill(name, 10_000, lambda: bytearray(10_000) if when != "fetch" else die(), 60)
"""


@pytest.mark.parametrize("when", ["fetch", "write", "rename"])
def test_a_process_killed_at_any_moment_leaves_a_valid_cache(tmp_path, when):
    command = [sys.executable, "-c", DIES, when, str(tmp_path), f"{FILE}-0"]
    environment = {**os.environ}
    blocks = Blocks(tmp_path, 4 * STORED)
    for _ in range(2):  # the second starts with the files that the first left
        assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    for number in range(1, 20):
        blocks.get(number)
        assert taken(tmp_path) <= 4 * STORED
    assert not list(tmp_path.glob("*.part"))
    assert blocks.get(0) == blocks.origin(0)
    assert blocks.fetched == [*range(1, 20), 0]


def test_blocks_published_by_a_killed_process_are_complete(tmp_path):
    command = [sys.executable, "-c", DIES, "renamed", str(tmp_path), f"{FILE}-0"]
    died = subprocess.run(command).returncode
    assert died == -signal.SIGKILL
    blocks = Blocks(tmp_path)
    assert blocks.get(0) == bytes(BLOCK)
    assert blocks.fetched == []


READS = """
import random, sys
from pathlib import Path
from forescale.remote.store import Store
from forescale.remote.transfer import Patience
url, cache, size, seed = sys.argv[1:]
store = Store(url, Path(cache), 1 << 28, Patience(tries=4, seconds=60))
file = store.open("a.tar", int(size), "v1")
starts = list(range(0, file.size, 100_000))
random.Random(int(seed)).shuffle(starts)
data = bytearray(file.size)
print("ready", flush=True)
sys.stdin.read()
for start in starts:
    file.read_at(start, memoryview(data)[start : start + 100_000])
sys.stdout.buffer.write(data)
"""


def reader(server, cache: Path, seed: int = 0) -> subprocess.Popen:
    """Start a process that is ready to read a.tar through the cache, and prints what it got."""
    size = str(len(server.files["/d/a.tar"]))
    process = subprocess.Popen(
        [sys.executable, "-c", READS, f"{server.url}/d", str(cache), size, str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def blocks_asked(server) -> list[int]:
    return [start >> 20 for start, _ in server.requests("/d/a.tar")]


def test_processes_that_share_a_cache_fetch_each_block_once(tmp_path):
    data = random.Random(9).randbytes(12_345_678)
    with serving() as server:
        server.files["/d/a.tar"] = data
        readers = [reader(server, tmp_path, seed) for seed in range(4)]
        for process in readers:
            process.stdin.close()
        assert all(process.stdout.read() == data for process in readers)
        assert [process.wait() for process in readers] == [0] * 4
        assert sorted(blocks_asked(server)) == list(range(12))


def test_the_block_of_a_killed_process_is_taken_over(tmp_path):
    with serving() as server:
        server.next_time("/d/a.tar", "half_then_wait")
        first, second = reader(server, tmp_path), reader(server, tmp_path)
        first.stdin.close()
        assert server.arrived.acquire(timeout=30)
        second.stdin.close()  # reads in the same order, so it needs the same block
        assert not server.arrived.acquire(timeout=0.3)
        first.kill()
        assert first.wait() == -signal.SIGKILL
        assert second.stdout.read() == DATA
        assert second.wait() == 0
        held, *rest = blocks_asked(server)
        assert sorted(rest) == [0, 1, 2]
        assert rest[0] == held


def test_a_surviving_fork_holds_no_lock(tmp_path, monkeypatch):
    """A thread forks while another publishes a block, so the child has the lock's descriptor."""
    blocks, rename, children = Blocks(tmp_path), os.rename, []

    def forking(*args) -> None:
        if not (pid := os.fork()):
            signal.pause()
        children.append(pid)
        rename(*args)

    monkeypatch.setattr(os, "rename", forking)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            blocks.get(0)
        with open(tmp_path / "usage") as usage:
            fcntl.flock(usage, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it isn't free
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert len(children) == 1
