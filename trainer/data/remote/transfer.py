"""Bytes from servers, through one loop that outlasts their faults.

    receive -> Origin.pieces (one try) -> web (http, https) or buckets (s3, gs, others)

Invariant: the pieces that `receive` yields are the bytes [start, stop) of the file, in order,
without gap or overlap, however many tries they took, all of one size and one version; or it raises
a UserError that names the address, what happened, how often it was tried and what to do. It ends:
no wait is longer than the Patience says.
"""

import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from forescale.errors import CRASHED, UserError

MIB = 1 << 20
_LONGEST = 30.0  # seconds between two tries, unless the server asks for more
_CHANGED = "restore it, or point to the version that was prepared"
_jitter = random.Random()  # not the global one: that is the run's, and may be part of its state
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a server may fail before its file counts as unreachable."""

    tries: int = 8  # in a row that bring not one byte
    seconds: float = 180.0  # for one MiB, all tries and pauses together
    timeout: float = 20.0  # for a connection, and from one byte to the next
    pause: float = 0.5  # after the first failure; doubles from try to try


PATIENCE = Patience()


class Unreachable(UserError):
    """A server failed for longer than the Patience allows. It says nothing of the file's bytes, and
    may answer again: the launcher retries."""

    code = CRASHED


class Missing(UserError):
    """The server says that there is no such file."""


class Fault(Exception):
    """One try failed; another may not. `wait`: seconds that the server asks for."""

    def __init__(self, what: str, wait: float = 0.0):
        super().__init__(what)
        self.what, self.wait = what, wait


class Origin:
    """A file at its server, and what is known of it: every answer must agree with that.

    size: in bytes, None as long as nobody has said; tag: the server's name for this version, "" as
    long as there is none.
    """

    def __init__(self, url: str, size: int | None = None):
        self.url, self.shown, self.size, self.tag = url, without_secrets(url), size, ""

    def pieces(self, start: int, stop: int | None, timeout: float, whole: bool) -> Iterator[bytes]:
        """One try at the bytes [start, stop), to the end with None. Fewer may come, never others.

        whole: take them from a server that ignores ranges too, though all before `start` has to be
        read again. Raises Fault, or UserError where another try is useless.
        """
        raise NotImplementedError

    def ask(self, timeout: float) -> None:
        """One try at learning size and version. Raises as `pieces`."""
        raise NotImplementedError

    def learn(self, size: int | None, tag: str) -> None:
        """Raises UserError where an answer is about another file than those before."""
        if size is not None and self.size is not None and size != self.size:
            what = f"{size:,} bytes on the server where {self.size:,} belong"
            raise UserError(self.shown, what, _CHANGED)
        if tag and self.tag and tag != self.tag:
            what = f"changed on the server between two requests (from {self.tag} to {tag})"
            raise UserError(self.shown, what, _CHANGED)
        self.size, self.tag = self.size if size is None else size, self.tag or tag


def is_url(name: str | Path) -> bool:
    """Whether this is an address and not a path.

    Raises UserError for what is neither: a command, a chain of addresses, a path dressed up as an
    address (it would be read through a cache, as from afar).
    """
    text = str(name)
    if found := re.match(r"(pipe|exec|shell|cmd|sh|bash):|\w+::", text):
        what = f"{found[0]!r} runs a command or a chain of them, which no config may"
        raise UserError(text, what, "give a path, or an address such as https:// or s3://")
    if found := re.match(r"(file|local)://", text):
        what = f"{found[0]!r} is no address of a server"
        raise UserError(text, what, "give the path alone, without it")
    found = re.match(r"[a-zA-Z][\w+.-]*://", text)
    if found and found[0] == text:
        raise UserError(text, "no address (it ends where the server belongs)", "give all of it")
    return found is not None


def without_secrets(url: str) -> str:
    """An address as it may be shown: no password, no signature."""
    head, _, query = url.partition("?")
    return re.sub(r"(?<=://)[^/]*@", "", head) + ("?..." if query else "")


def receive(
    origin: Origin, start: int, stop: int | None, patience: Patience, whole: bool = False
) -> Iterator[bytes]:
    """The bytes [start, stop) in pieces; stop None: to the end. Raises UserError.

    Goes on where a failed try broke off. The time that the caller takes between two pieces doesn't
    count. Where no size is known and the server gives none, a body cut off by a closed connection
    looks whole.
    """
    trying = _Trying(origin.shown, patience)
    at = start
    while stop is None or at < stop:
        try:
            before = at
            for piece in trying.timed(origin.pieces(at, stop, patience.timeout, whole)):
                at += len(piece)
                yield piece
            stop = origin.size if stop is None else stop
            if stop is None:
                return
            if at == before and at < stop:
                raise Fault("the answer is empty")
        except Fault as fault:
            trying.failed(fault)


def fetch(origin: Origin, start: int, stop: int, patience: Patience) -> bytearray:
    """The bytes [start, stop). Raises UserError."""
    data, at = bytearray(stop - start), 0
    for piece in receive(origin, start, stop, patience):
        data[at : at + len(piece)] = piece
        at += len(piece)
    return data


def persist(shown: str, patience: Patience, attempt: Callable[[], T]) -> T:
    """The result of `attempt`, tried again after each Fault. Raises UserError."""
    trying = _Trying(shown, patience)
    while True:
        try:
            return attempt()
        except Fault as fault:
            trying.failed(fault)


class _Trying:
    """The account of one transfer: how often it failed, and for how long nothing came."""

    def __init__(self, shown: str, patience: Patience):
        self.shown, self.patience = shown, patience
        self.tries = self.in_a_row = self.arrived = 0
        self.waited, self.since = 0.0, time.monotonic()

    def timed(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        self.since = time.monotonic()
        for piece in pieces:
            self.waited += time.monotonic() - self.since
            self.in_a_row = 0
            self.arrived += len(piece)
            if self.arrived >= MIB:
                self.waited, self.arrived = 0.0, 0
            yield piece
            self.since = time.monotonic()
            if self.waited > self.patience.seconds:  # each byte in time, but hardly any
                raise Fault(f"too slow: {self.arrived:,} bytes in {self.waited:,.1f} s")

    def failed(self, fault: Fault) -> None:
        """Wait before the next try, or raise Unreachable."""
        self.waited += time.monotonic() - self.since
        self.tries += 1
        self.in_a_row += 1
        pause = min(self.patience.pause * 2 ** (self.in_a_row - 1), _LONGEST)
        pause = max(fault.wait, pause * _jitter.uniform(0.5, 1.0))  # ranks don't return together
        over = self.waited + pause > self.patience.seconds
        if over or self.in_a_row >= self.patience.tries:
            asks = f" and asks to wait {fault.wait:,.0f} s" if fault.wait and over else ""
            tried = "once" if self.tries == 1 else f"{self.tries} times"
            todo = "check the address, the network and the server, then give the command again"
            raise Unreachable(self.shown, f"{fault.what}{asks} (tried {tried})", todo) from fault
        if self.in_a_row == 3:  # by now somebody may wonder
            told = f"{self.shown}: {fault.what}; trying again"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
        time.sleep(pause)
        self.waited += pause
        self.since = time.monotonic()
