"""Followers of growing files of rows: each update reads only the rows added since the last one.

Invariant: what a follower knows of a file is what a new one would find. A file that was replaced,
cut off or changed in place is read again from its beginning; of an old part that changes while the
file also grows, only the last row is compared.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

from forescale.ground.storage import naming
from forescale.run.rows import Row, damaged, parse_row

BLOCK = 1 << 17  # bytes that are read at once
TRAIN = b'{"kind": "train", '  # how the line of a step begins
RECENT = 20  # rows of a tail
_COMPARED = 256  # bytes of the last row
_SCORE = b'"kind": "validation"'


class Follower:
    """Reads the whole lines of a file, block by block; a subclass says what it makes of them.

    A damaged line raises UserError, now and at each later look.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stamp: tuple[int, ...] = ()
        self._forget()

    def _forget(self) -> None:
        """Begin anew. Subclasses forget what they know."""
        self._file: tuple[int, ...] = ()
        self._offset, self._last = 0, b""  # the end of the lines that were read, and of the last

    def _begin(self, f: IO[bytes]) -> int:
        """Return the offset of the first line that is needed."""
        return 0

    def _take(self, lines: list[bytes]) -> None:
        """Take the next lines, all of which are sound."""
        raise NotImplementedError

    def update(self) -> Self:
        """Read what was added since the last call. Raises UserError for a damaged row."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._forget()
            self._stamp = ()
            return self
        stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if stamp != self._stamp:
            self._stamp = ()  # if a row is damaged, look again next time
            with naming(self.path), open(self.path, "rb") as f:
                if not self._goes_on(stamp, f):
                    self._forget()
                    self._offset, self._file = self._begin(f), stamp[:2]
                self._read(f)
            self._stamp = stamp
        return self

    def _goes_on(self, stamp: tuple[int, ...], f: IO[bytes]) -> bool:
        """Return True if the file is the one that was read before, and has only grown."""
        if stamp[:2] != self._file or stamp[2] <= self._offset:
            return False
        f.seek(self._offset - len(self._last))
        return f.read(len(self._last)) == self._last

    def _read(self, f: IO[bytes]) -> None:
        f.seek(self._offset)
        rest = b""  # of a line that the block cuts
        while block := f.read(BLOCK):
            block = rest + block
            if end := block.rfind(b"\n") + 1:
                lines = block[: end - 1].split(b"\n")
                self._expect_sound(lines)
                self._take(lines)
                self._offset += end
                self._last = block[max(0, end - _COMPARED) : end]
            rest = block[end:]

    def _expect_sound(self, lines: list[bytes]) -> None:
        """Raise UserError if a row is damaged. Only where the checksum differs, or an earlier
        version wrote none, a row is parsed for it."""
        crc32 = zlib.crc32
        for line in lines:
            if not line.endswith(b', "crc": "%08x"}' % crc32(b"}", crc32(line[:-20]))):
                try:
                    if line:
                        parse_row(line)
                except (ValueError, RecursionError) as e:
                    raise damaged(f"{self.path}, line {self._number(line):,}", e) from None

    def _number(self, content: bytes) -> int:
        """Return the number of the first line with this content, from 1."""
        with open(self.path, "rb") as f:
            return next((n for n, line in enumerate(f, 1) if line[:-1] == content), 0)


def lines_of(kind: bytes, lines: list[bytes]) -> Iterator[bytes]:
    """Yield the lines of rows of a kind."""
    mark = b'"kind": "%s"' % kind
    return (line for line in lines if mark in line)


class Tail(Follower):
    """The last train rows and validation rows of a metrics.jsonl, RECENT of each at most; at least
    one validation row, if there is any. Rows before them are not read, nor verified."""

    def _forget(self) -> None:
        super()._forget()
        self._steps: deque[bytes] = deque(maxlen=RECENT)
        self._scores: deque[bytes] = deque(maxlen=RECENT)

    @property
    def steps(self) -> list[Row]:
        """The last train rows."""
        return [*map(parse_row, self._steps)]

    @property
    def scores(self) -> list[Row]:
        """The last validation rows."""
        return [*map(parse_row, self._scores)]

    def _begin(self, f: IO[bytes]) -> int:
        end = f.seek(0, 2)
        size = 2 * BLOCK
        while size < end:
            f.seek(end - size)
            block = f.read(size)
            cut = block.find(b"\n") + 1  # the end of a row that is not whole
            if block.count(TRAIN, cut) >= RECENT and block.find(_SCORE, cut) >= 0:
                return end - size + cut
            size *= 4
        return 0

    def _take(self, lines: list[bytes]) -> None:
        self._steps.extend(lines_of(b"train", lines))
        self._scores.extend(lines_of(b"validation", lines))
