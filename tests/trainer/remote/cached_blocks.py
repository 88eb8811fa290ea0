"""A block cache in front of an origin that counts its requests."""

import random
from pathlib import Path

from forescale.remote.cache import BlockCache

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
