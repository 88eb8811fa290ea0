"""One cache for all processes of a node: each block is fetched once, even if processes are
killed."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.trainer.remote.cached_blocks import BLOCK, FILE, STORED, Blocks, taken
from tests.trainer.remote.remote_files import DATA, serving

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
