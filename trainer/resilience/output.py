"""The output of rank 0: shown where its launcher was started, and kept in attempts/NNNN/rank-0.log.

    rank 0  ->  a pseudo-terminal or a pipe  ->  this file as a process  ->  terminal and log

A pseudo-terminal stands in for a terminal, so that rank 0 draws its progress line; of that line the
log gets one state now and then. The copy is a process of its own: the ranks go on while the
launcher is suspended. Invariant: rank 0 never waits for the log, and what it wrote before it ended,
in whatever way, is copied. This file is run as a script, so it imports the standard library alone.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import IO

BLOCK = 1 << 16
PIPE = 1 << 20  # bytes that rank 0 can write ahead; Linux allows a user this much
_EVERY = 10.0  # seconds between two states of a redrawn line in the log
_LONGEST = 1 << 16  # bytes of a line that doesn't end
_ESCAPE = re.compile(
    r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|.)?|[\x00-\x08\x0b-\x1f\x7f]"
)
_BAR = " ━╸╺"  # what the progress line draws at its end


@contextlib.contextmanager
def copied_output(log: Path) -> Iterator[dict[str, int]]:
    """Yield the file descriptors `stdout` and `stderr` for rank 0, whose output is copied to `log`
    and to this process's own. Close them (`close`) once rank 0 has them."""
    ends: dict[str, int] = {}
    ways = []
    same = False
    with contextlib.suppress(OSError):  # one of them is closed
        same = os.path.sameopenfile(1, 2)
    for name, target in (("stdout", 1), ("stderr", 2)):
        if name == "stderr" and same:
            ends[name] = ends["stdout"]  # one way, so that the order stays
            continue
        source, ends[name] = open_way(target)
        ways.append((source, target))
    sources = [source for source, _ in ways]
    words = [f"{source}:{target}" for source, target in ways]
    copier = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(log), *words],
        pass_fds=sources,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_prepare,
    )
    for source in sources:
        os.close(source)
    try:
        yield ends
    finally:
        close(ends)
        copier.terminate()  # it first copies what is there
        try:
            copier.wait(10)
        except subprocess.TimeoutExpired:  # the terminal takes nothing
            copier.kill()
            copier.wait()


def close(ends: dict[str, int]) -> None:
    """Close what `copied_output` yielded: the copy ends with the last process that has it open."""
    for end in set(ends.values()):
        with contextlib.suppress(OSError):
            os.close(end)
    ends.clear()


def open_way(target: int = -1) -> tuple[int, int]:
    """Return the ends (to read, to write) of a pseudo-terminal for a terminal, else of a pipe."""
    if os.isatty(target):
        source, end = os.openpty()
        tty.setraw(end)  # the real terminal translates line ends
        _copy_size(target, source)
        return source, end
    source, end = os.pipe()
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE)
    return source, end


def _copy_size(terminal: int, other: int) -> None:
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
        fcntl.ioctl(other, termios.TIOCSWINSZ, size)


def _prepare() -> None:
    """In the new process: end with the parent; hold back a SIGTERM until it is handled."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Lines:
    """The lines of a terminal as text: without escape sequences; of a line that is drawn again and
    again, the last state and one each `every` seconds."""

    def __init__(self, file: IO[bytes], every: float = _EVERY):
        self._file, self._every = file, every
        self._line = b""
        self._next = 0.0

    def write(self, data: bytes) -> None:
        """Take output as it comes, in pieces of any size."""
        *ended, self._line = (self._line + data).split(b"\n")
        for line in ended:
            self._add(line.removesuffix(b"\r").rpartition(b"\r")[2], keep_empty=True)
        drawn, again, rest = self._line.rpartition(b"\r")
        if again and rest:  # what was drawn before is gone from the terminal
            if time.monotonic() >= self._next and self._add(drawn.rpartition(b"\r")[2]):
                self._next = time.monotonic() + self._every
            self._line = again + rest
        if len(self._line) > _LONGEST:
            self.end()

    def end(self) -> None:
        self._add(self._line.rpartition(b"\r")[2])
        self._line = b""

    def _add(self, line: bytes, keep_empty: bool = False) -> bool:
        """Write the text of a line; return False if it has none."""
        raw = line.decode(errors="replace")
        text = _ESCAPE.sub("", raw).rstrip(_BAR)
        if text or (keep_empty and not raw):
            self._file.write(text.encode() + b"\n")
        return bool(text)


def _copy(log: Path, ways: dict[int, int]) -> None:
    """Copy until every source has ended, or after SIGTERM until nothing is left to read."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    with open(log, "ab", buffering=0) as file:
        lines = {source: Lines(file) for source, target in ways.items() if os.isatty(target)}
        while ways:
            ready, _, _ = select.select(list(ways), [], [], 0.0 if stopped else 0.5)
            if stopped and not ready:
                break
            for source in ready:
                if not (data := _read(source)):
                    del ways[source]
                    continue
                if source in lines:
                    _copy_size(ways[source], source)
                _write(ways[source], data)
                with contextlib.suppress(OSError):  # a full disk: training itself reports it
                    lines.get(source, file).write(data)
        for rest in lines.values():
            with contextlib.suppress(OSError):
                rest.end()


def _read(source: int) -> bytes:
    try:
        return os.read(source, BLOCK)
    except OSError:  # a pseudo-terminal whose last writer is gone
        return b""


def _write(target: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(target, data) :]
        except BlockingIOError:  # another program has made the terminal so
            select.select([], [target], [])
        except OSError:  # the terminal is gone; the log goes on
            return


if __name__ == "__main__":
    _copy(Path(sys.argv[1]), dict(tuple(map(int, word.split(":"))) for word in sys.argv[2:]))  # type: ignore[misc]
