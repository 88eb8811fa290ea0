"""Has ranks forked from a process that has imported what each of them needs, the template
(forking.py).

    launcher, or supervisor of a job          template
    rank, start: variables, log, attempt  ->  forks the rank. log: its own file, or null; attempt:
                                              whose log of this node has its output, or null
    rank, signal                          ->  sends it to the rank, where its launcher can't
                                          <-  fault: why it can't fork; null if it can
                                          <-  rank, pid
                                          <-  rank, code: it has ended

A message is a line of JSON. Invariant: a rank dies with its template, and that with its launcher.
Where anything fails, ranks start as processes of their own.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from forescale.ground.processes import die_with_parent
from forescale.resilience.outcome import describe_code

TEMPLATE = "FORESCALE_TEMPLATE"  # environment variable: the descriptor of a template's socket
LONGEST = 1 << 24  # bytes of a message
_FORK = 30.0  # seconds that a fork may take
_LAST = 5.0  # seconds after the end of a rank until a template that doesn't report it is killed


class Channel:
    """Messages over a connected socket. Descriptors travel beside them over a unix socket."""

    def __init__(self, connected: socket.socket, longest: int = LONGEST):
        self.socket, self.longest = connected, longest
        self.descriptors: list[int] = []
        self._buffer = b""

    def send(self, *descriptors: int, **message: Any) -> None:
        """Send a message; to a closed end, nothing: it is noticed when reading."""
        with suppress(OSError):
            line = json.dumps(message).encode() + b"\n"
            if descriptors:
                socket.send_fds(self.socket, [line], descriptors)
            else:
                self.socket.sendall(line)

    def receive(self, seconds: float | None = None) -> list[dict[str, Any]]:
        """Return the messages that come within some seconds (None: as long as it takes). Raises
        EOFError if the other end is closed, ValueError if what comes is no message."""
        if seconds is not None and not select.select([self.socket], [], [], seconds)[0]:
            return []
        size = min(1 << 16, self.longest - len(self._buffer))
        try:
            data, descriptors, _, _ = socket.recv_fds(self.socket, size, 8)
        except OSError:
            data, descriptors = b"", []
        self.descriptors += descriptors
        if not data:
            raise EOFError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) >= self.longest:
            raise ValueError("a line without an end")
        try:
            return [json.loads(line) for line in lines]
        except RecursionError:
            raise ValueError("a message nested too deep") from None


class Template:
    """The template of the ranks of one launcher. command: of a rank."""

    def __init__(self, command: Sequence[str]):
        self.command = command
        self.process: subprocess.Popen | None = None
        self._is_ready, self._fault = False, ""
        self._threads: str | None = None
        self._ranks: dict[int, ForkedRank] = {}

    def start(self, environment: dict[str, str]) -> None:
        """Start the process, if none is there whose libraries have as many threads. environment:
        what all ranks have in common."""
        threads, self._threads = self._threads, environment.get("OMP_NUM_THREADS")
        if self.process and threads != self._threads:
            self.end()
        if self.process or self._fault or not sys.platform.startswith("linux"):
            return
        near, far = socket.socketpair()
        self.channel, self._is_ready, self._ranks = Channel(near), False, {}
        with far:
            self.process = subprocess.Popen(
                self.command,
                env={**environment, TEMPLATE: str(far.fileno())},
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def begin(self, environment: dict[str, str], is_over: Callable[[], bool]) -> str:
        """Start the process, if none is there, and wait until it can fork ranks, or `is_over`.
        Return why it can't, the first time that it is so; else ""."""
        self.start(environment)
        if not self.process:
            return ""
        while self.process and not (self._is_ready or self._fault or is_over()):
            self.read(0.1)
        return self._fault

    def end(self, why: str = "") -> None:
        """End the process; one that has failed has ended its ranks. why: it failed."""
        if self.process:
            self.channel.socket.close()
            self.process.kill()
            self.process.wait()
            self.process = None
        for rank in self._ranks.values():
            if rank.returncode is None:
                rank.finish(-signal.SIGKILL, why)

    def read(self, seconds: float | None = 0.0) -> bool:
        """Take what it reports within some seconds; return False if that is nothing."""
        if not self.process:
            return True
        try:
            messages = self.channel.receive(seconds)
        except EOFError:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
            code = self.process.returncode
            end = "" if code is None else f" with {describe_code(code)}"
            self._fault = "" if self._is_ready else f"the process that forks them has ended{end}"
            self.end(f"the process that forked it has ended{end}")
            return True
        for message in messages:
            if "fault" in message:
                self._is_ready, self._fault = not message["fault"], message["fault"] or ""
            elif "pid" in message:
                self._ranks[message["rank"]] = ForkedRank(self, message["rank"], message["pid"])
            else:
                self._ranks[message["rank"]].finish(message["code"])
        if self._fault:
            self.end()
        return bool(messages)

    def fork(
        self, rank: int, variables: dict[str, str], log: Path | None, *output: int
    ) -> "ForkedRank | None":
        """Return a new rank; None if there is no template that can fork. variables: of its
        environment; output: descriptors of its output and its errors, where it has no log."""
        if not (self.process and self._is_ready):
            return None
        self._ranks.pop(rank, None)
        message = {"rank": rank, "start": variables, "log": log and str(log), "session": True}
        self.channel.send(*output, **message)
        while self.process and rank not in self._ranks:
            if not self.read(_FORK):
                self.end("the process that forks ranks did not answer")
        return self._ranks.get(rank)


class ForkedRank:
    """A rank that a template has forked, with what a launcher uses of subprocess.Popen. why: it was
    killed, where that is known. Signals go straight to it, and its end is noticed here: a template
    may be suspended. Only the exit code is the template's to report."""

    returncode: Any = None  # as of Popen: an int once it has ended
    why = ""

    def __init__(self, template: Template, rank: int, pid: int):
        self.template, self.rank, self.pid = template, rank, pid
        self._descriptor: int | None = None  # of this process, also once its number is used again
        with suppress(OSError, AttributeError):  # before Linux 5.3; or it has ended
            self._descriptor = os.pidfd_open(pid)

    def finish(self, code: int, why: str = "") -> None:
        """Note its end."""
        self.returncode, self.why = code, why
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def poll(self) -> int | None:
        self.template.read()
        watched = [self._descriptor] if self._descriptor is not None else []
        if watched and select.select(watched, [], [], 0)[0]:  # it has ended
            self.wait()
        return self.returncode

    def wait(self) -> int | None:
        """Wait for the report of its end. It has ended, or was killed: a suspended template goes
        on, and one that reports nothing is killed, too."""
        while self.returncode is None:
            if self.template.process:
                self.template.process.send_signal(signal.SIGCONT)
            if not self.template.read(_LAST):
                self.template.end("the process that forked it did not report its end")
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self._descriptor is None:
            self.template.channel.send(rank=self.rank, signal=number)
        else:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
