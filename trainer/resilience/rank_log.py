"""What a rank prints: read by the launcher and by people, and copied to the log of its node.

    attempts/0003/rank-1.log      of one rank: those of a launcher on one machine, which are few
    attempts/0003/node-4.log      of all ranks of a node of a job, the fifth; each line begins with
                                  its rank, as srun's --label writes it: `37: text`
    attempts/0003/node-4.log.1    what was in it before the last 64 MiB or less

Invariant: a line is written whole, by one call that appends, so that the processes of a node can
share a file; one of them alone renames it. Readers see a rank's lines in their order. A rank never
fails for its log: lines that a full disk doesn't take are lost, and a line says so once it does.
"""

import errno
import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from forescale.resilience.output import BLOCK, PIPE, Lines, open_way

LARGEST = 1 << 26  # bytes of a node's log; then it is renamed
LOOK = 60.0  # seconds between two looks at its size
_ATTEMPTS = 20  # the newest ones of a run, whose nodes' logs are kept


@dataclass(frozen=True)
class RankLog:
    """The lines of one rank in a file. rank: the one in a log of its node; None: all is of one."""

    path: Path
    rank: int | None = None

    def __str__(self) -> str:
        return f"{self.path}" if self.rank is None else f"{self.path}, rank {self.rank}"

    @property
    def exists(self) -> bool:
        return self.path.exists() or Path(f"{self.path}.1").exists()

    def last(self, count: int) -> list[str]:
        """Return the last lines that are there."""
        return list(deque(iter(self.reader(), ""), maxlen=count))

    def reader(self) -> Callable[[], str]:
        """Return a function that returns the next line at each call, and "" where there is none
        yet, as `readline` of a file does; renamed files are read, too."""
        return partial(next, self._lines())

    def _lines(self) -> Iterator[str]:
        file, rest = self._after(None), ""
        while True:
            line = file.readline() if file else ""
            newer = None if line else self._after(file)
            if newer and not (line := file.readline() if file else ""):  # just before the rename
                file, rest = newer, ""
                continue
            if self.rank is None or not line:
                yield line
            elif (rest := rest + line).endswith("\n"):  # else it isn't written whole yet
                number, _, text = rest.partition(": ")
                rest = ""
                if number.strip() == str(self.rank):
                    yield text

    def _after(self, file: TextIO | None) -> TextIO | None:
        """Return the file that follows this one, or is the oldest; None where there is none."""
        paths = [path for path in (Path(f"{self.path}.1"), self.path) if path.exists()]
        end = None if self.rank is None else "\n"
        with suppress(OSError, IndexError):
            same = [file and os.path.samefile(file.fileno(), path) for path in paths]
            number = same.index(True) + 1 if True in same else 0
            return open(paths[number], errors="replace", newline=end)
        return None


class NodeLog:
    """Copies what one rank writes to a pipe, `end`, to the log of its node, as text: see `Lines`.
    rotates: true in one of the processes that write to it."""

    def __init__(self, path: Path, rank: int, rotates: bool):
        self.path, self.rank, self.rotates = path, rank, rotates
        self.source, self.end = open_way()
        os.set_blocking(self.source, False)
        self._whole, self._lost = io.BytesIO(), ""
        self._lines = Lines(self._whole)
        self._append()

    def copy(self) -> bool:
        """Copy what is there; return False if it was nothing."""
        try:
            self._lines.write(os.read(self.source, BLOCK))
        except BlockingIOError:
            return False
        self._append()
        return True

    def close(self) -> None:
        """Copy the rest, after the rank has ended, but not what it started and left writing."""
        for _ in range(PIPE // BLOCK + 1):
            if not self.copy():
                break
        self._lines.end()
        self._append()
        os.close(self.source)
        os.close(self.end)

    def rotate(self) -> None:
        with suppress(OSError):
            if self.rotates and self.path.stat().st_size > LARGEST:
                self.path.replace(f"{self.path}.1")

    def _append(self) -> None:
        lines = self._whole.getvalue().splitlines(keepends=True)
        self._whole.seek(self._whole.truncate(0))
        if lines and self._lost:
            lines = [f"forescale: lines are missing here: {self._lost}\n".encode(), *lines]
        text = b"".join(b"%d: %b" % (self.rank, line) for line in lines)
        text = b"\n" * bool(text and self._lost) + text  # behind a piece of a line
        try:  # opened anew each time: another process may have renamed it
            with open(self.path, "ab", buffering=0) as file:
                if text and file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._lost = "" if text else self._lost
        except OSError as e:
            self._lost = e.strerror or str(e)
        self.rotate()


def remove_old(attempts: Sequence[Path]) -> None:
    """Remove the logs of nodes of all but the newest attempts."""
    with suppress(OSError):
        for path in [path for one in attempts[:-_ATTEMPTS] for path in one.glob("node-*.log*")]:
            path.unlink()
