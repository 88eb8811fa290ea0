"""Receive bytes from servers, with one loop that retries after errors.

    receive -> Origin.pieces (one try) -> web (http, https) or buckets (s3, gs, others)

Invariant: the pieces that `receive` yields are the bytes [start, stop) of the file, in order,
without gap or overlap, however many tries they took, all of one size and one version; otherwise it
raises a UserError with the address, what happened, how often it was tried and what to do. It always
ends: no wait is longer than the Patience allows.
"""

import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from forescale.ground.errors import Transient, UserError, masked, with_secrets

MIB = 1 << 20
_LONGEST = 30.0  # maximum seconds between two tries, unless the server asks for more
_CHANGED = "restore the original file, or use the address of the version that was prepared"
_jitter = random.Random()  # not the global one: that belongs to the run's state
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a server may fail before its file counts as unreachable."""

    tries: int = 8  # consecutive tries without a single byte
    seconds: float = 180.0  # for one MiB, including all tries and pauses
    timeout: float = 20.0  # seconds for a connection, and between two bytes
    pause: float = 0.5  # seconds after the first failure; doubles with every try


PATIENCE = Patience()


class Unreachable(Transient):
    """A server failed for longer than the Patience allows."""


class WrongFile(UserError):
    """The file isn't the one that was prepared: it is gone, or has another size or version."""


class Missing(WrongFile):
    """The storage or the server reports that the file doesn't exist."""


class RetryableError(Exception):
    """One try failed; another may succeed. wait: seconds that the server asks for."""

    def __init__(self, problem: str, wait: float = 0.0):
        super().__init__(problem)
        self.problem, self.wait = masked(problem), wait


class Origin:
    """A file at its server, and its known properties: every answer must agree with them.

    size: in bytes, None until known; tag: the server's name for this version, "" until known.
    """

    def __init__(self, url: str, size: int | None = None):
        """url: address of the file; it may name variables that hold its secrets."""
        self.url, self.where, self.size, self.tag = url, masked(url), size, ""

    def pieces(self, start: int, stop: int | None, timeout: float, whole: bool) -> Iterator[bytes]:
        """Yield the bytes [start, stop) in one try, up to the end with None. There may be fewer,
        but never others.

        whole: also accept them from a server that ignores ranges, although everything before
        `start` has to be read again. Raises RetryableError, or UserError if another try is useless.
        """
        raise NotImplementedError

    def ask(self, timeout: float) -> None:
        """Try once to learn size and version. Raises like `pieces`."""
        raise NotImplementedError

    def learn(self, size: int | None, tag: str) -> None:
        """Store size and version. Raises UserError if they differ from those of earlier answers."""
        if size is not None and self.size is not None and size != self.size:
            problem = f"has {size:,} bytes on the server, expected {self.size:,}"
            raise WrongFile(self.where, problem, _CHANGED)
        if tag and self.tag and tag != self.tag:
            problem = f"changed on the server between two requests (from {self.tag} to {tag})"
            raise WrongFile(self.where, problem, _CHANGED)
        self.size, self.tag = self.size if size is None else size, self.tag or tag


def is_url(name: str | Path) -> bool:
    """Return whether this is an address and not a path.

    Raises UserError if it is neither: a command, a chain of addresses, or a path written as an
    address (it would be read through a cache, like a remote file).
    """
    text = str(name)
    if match := re.match(r"(pipe|exec|shell|cmd|sh|bash):|\w+::", text):
        problem = f"{match[0]!r} would run a command or a chain of addresses, which isn't allowed"
        raise UserError(text, problem, "give a path, or an address such as https:// or s3://")
    if match := re.match(r"(file|local)://", text):
        problem = f"{match[0]!r} isn't the address of a server"
        raise UserError(text, problem, "give the path without it")
    match = re.match(r"[a-zA-Z][\w+.-]*://", text)
    if match and match[0] == text:
        raise UserError(
            text, "isn't a complete address: the server is missing", "give the full address"
        )
    return match is not None


def for_request(url: str) -> str:
    """Return an address with its secrets from the environment. Raises UserError without one."""
    try:
        return with_secrets(url)
    except LookupError as e:
        name = e.args[0]
        problem = f"needs the environment variable {name}, which is not set"
        raise UserError(masked(url), problem, f"set it: export {name}=VALUE") from None


def receive(
    origin: Origin, start: int, stop: int | None, patience: Patience, whole: bool = False
) -> Iterator[bytes]:
    """Yield the bytes [start, stop) in pieces; stop None: to the end. Raises UserError.

    Continues where a failed try ended. The time that the caller takes between two pieces doesn't
    count. If no size is known and the server gives none, a body cut off by a closed connection
    can't be recognised.
    """
    trying = _Trying(origin.where, patience)
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
                raise RetryableError("the answer is empty")
        except RetryableError as fault:
            trying.failed(fault)


def fetch(origin: Origin, start: int, stop: int, patience: Patience) -> bytearray:
    """Return the bytes [start, stop). Raises UserError."""
    data, at = bytearray(stop - start), 0
    for piece in receive(origin, start, stop, patience):
        data[at : at + len(piece)] = piece
        at += len(piece)
    return data


def persist(where: str, patience: Patience, attempt: Callable[[], T]) -> T:
    """Return the result of `attempt`, tried again after each RetryableError. Raises UserError."""
    trying = _Trying(where, patience)
    while True:
        try:
            return attempt()
        except RetryableError as fault:
            trying.failed(fault)


def exists(origin: Origin, patience: Patience) -> bool:
    """Return True if there is such a file now. Raises UserError."""
    try:
        persist(origin.where, patience, partial(origin.ask, patience.timeout))
    except Missing:
        return False
    return True


class _Trying:
    """The state of one transfer: number of failures, and for how long nothing came."""

    def __init__(self, where: str, patience: Patience):
        self.where, self.patience = where, patience
        self.tries = self.in_a_row = self.arrived = 0
        self.waited, self.since = 0.0, time.monotonic()

    def timed(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the pieces; raise RetryableError if they come too slowly."""
        self.since = time.monotonic()
        for piece in pieces:
            self.waited += time.monotonic() - self.since
            self.in_a_row = 0
            self.arrived += len(piece)
            if self.arrived >= MIB:
                self.waited, self.arrived = 0.0, 0
            yield piece
            self.since = time.monotonic()
            if self.waited > self.patience.seconds:  # every byte came in time, but too few of them
                raise RetryableError(f"too slow: {self.arrived:,} bytes in {self.waited:,.1f} s")

    def failed(self, fault: RetryableError) -> None:
        """Wait before the next try, or raise Unreachable."""
        self.waited += time.monotonic() - self.since
        self.tries += 1
        self.in_a_row += 1
        pause = min(self.patience.pause * 2 ** (self.in_a_row - 1), _LONGEST)
        # Random, so that ranks don't retry at the same moment.
        pause = max(fault.wait, pause * _jitter.uniform(0.5, 1.0))
        over = self.waited + pause > self.patience.seconds
        if over or self.in_a_row >= self.patience.tries:
            asks = f" and asks to wait {fault.wait:,.0f} s" if fault.wait and over else ""
            tried = "once" if self.tries == 1 else f"{self.tries} times"
            todo = "check the address, the network and the server, then run the command again"
            raise Unreachable(self.where, f"{fault.problem}{asks} (tried {tried})", todo) from fault
        if self.in_a_row == 3:  # by now people may wonder about the delay
            text = f"{self.where}: {fault.problem}; trying again"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        time.sleep(pause)
        self.waited += pause
        self.since = time.monotonic()
