"""Forks ranks from a process that has imported what each of them needs, the template.

    launcher, or supervisor of a job          template
    rank, start: variables, log, attempt  ->  forks the rank. log: its own file, or null; attempt:
                                              whose log of this node has its output, or null
    rank, signal                          ->  sends it to the rank, where its launcher can't
                                          <-  fault: why it can't fork; null if it can
                                          <-  rank, pid
                                          <-  rank, code: it has ended

A message is a line of JSON. Invariant: a template forks only while it has one thread and no CUDA
driver has begun in it, for nothing of either would work in a fork. A rank dies with its template,
and that with its launcher. Where anything fails, ranks start as processes of their own.
"""

import ctypes
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

from forescale.ground.errors import CRASHED
from forescale.ground.processes import die_with_parent, name_process
from forescale.resilience.outcome import describe_code, kills_for_memory
from forescale.resilience.rank_log import LOOK, NodeLog

TEMPLATE = "FORESCALE_TEMPLATE"  # environment variable: the descriptor of a template's socket
_NO_CUDA = 3  # CUDA_ERROR_NOT_INITIALIZED
LONGEST = 1 << 24  # bytes of a message
_CONNECT = 20.0  # seconds to reach the supervisor of a job
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


def requested() -> Channel | None:
    """Return the channel to who asks this process to be a template; None if nobody does, or the
    supervisor of its job can't be reached."""
    value = os.environ.pop(TEMPLATE, "")
    if not value or value.isdecimal():
        return Channel(socket.socket(fileno=int(value))) if value else None
    where, _, token = value.rpartition(":")
    host, _, port = where.rpartition(":")
    try:
        connected = socket.create_connection((host, int(port)), timeout=_CONNECT)
    except OSError:
        return None
    connected.settimeout(None)
    channel = Channel(connected)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    channel.send(token=token, rank=os.environ["RANK"], host=node)
    return channel


def fault() -> str | None:
    """Return why no rank can be forked from this process; None if one can."""
    if not (pid := os.fork()):  # OpenBLAS ends its threads before a fork
        os._exit(0)
    os.waitpid(pid, 0)
    if threads := len(os.listdir("/proc/self/task")) - 1:
        count = f"{threads} thread{'s' * (threads > 1)}"
        return f"a library has started {count} while it was imported"
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NO_CUDA:
            return "a library has started the CUDA driver while it was imported"
    return None


def serve(channel: Channel, signals: Sequence[int]) -> None:
    """Fork a rank for each request, and return in each of them, with its variables and its output.
    In the template itself it returns only if it can't fork and so is a rank: once the channel is
    closed and no rank is left, it ends as the last one did. signals: blocked here, and in a
    rank until it listens to them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    reason = fault()
    channel.send(fault=reason)
    if reason and "RANK" in os.environ:
        return
    parent, ranks, code, is_open = os.getpid(), dict[int, int](), 0, True
    killed, kills, logs = set[int](), kills_for_memory(), dict[int, NodeLog]()
    incoming, (ended, wakeup) = channel.socket.fileno(), os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    # Between attempts SIGTERM ends it: SLURM sends that before it waits, and then kills.
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    is_ending = False
    while (is_open and not is_ending) or ranks:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        waits = [ended, *(log.source for log in logs.values()), *[incoming][:is_open]]
        ready, _, _ = select.select(waits, [], [], LOOK if logs else None)
        for log in logs.values():
            log.copy() if log.source in ready else log.rotate()
        if ended in ready:
            is_ending = is_ending or signal.SIGTERM in os.read(ended, 1 << 10)
            while ranks and (status := os.waitpid(-1, os.WNOHANG))[0]:
                if (rank := ranks.pop(status[0], None)) is None:
                    continue  # a process that a library started
                code = os.waitstatus_to_exitcode(status[1])
                if rank in logs:
                    logs.pop(rank).close()
                end = {"code": code, "killed": rank in killed}
                memory = code == -signal.SIGKILL and kills_for_memory() > kills
                channel.send(rank=rank, memory=memory, **end)
        if incoming not in ready or (is_ending and not ranks):
            continue
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # in a fork it stays so
        try:
            messages = channel.receive()
        except EOFError:
            is_open = False
            continue
        for message in messages:
            if attempt := message.get("attempt"):
                path = Path(attempt) / f"node-{os.environ['SLURM_NODEID']}.log"
                log = NodeLog(path, message["rank"], os.environ["LOCAL_RANK"] == "0")
                logs[message["rank"]] = log
                channel.descriptors += [os.dup(log.end), os.dup(log.end)]
            if "signal" in message:
                for pid in [pid for pid, rank in ranks.items() if rank == message["rank"]]:
                    os.kill(pid, message["signal"])
                    killed |= {message["rank"]} if message["signal"] == signal.SIGKILL else set()
            elif pid := os.fork():
                killed.discard(message["rank"])
                kills = kills_for_memory()
                ranks[pid] = message["rank"]
                channel.send(rank=message["rank"], pid=pid)
                for descriptor in channel.descriptors:
                    os.close(descriptor)
                channel.descriptors.clear()
            else:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGCHLD, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                for descriptor in (ended, wakeup, *(log.source for log in logs.values())):
                    os.close(descriptor)
                _become(channel, message, parent)
                return
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(parent, -code)
    os._exit(code)


def _become(channel: Channel, message: dict[str, Any], parent: int) -> None:
    """In a fork: become the rank that a message describes."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(CRASHED)
    if message["session"]:
        os.setsid()
    name_process(f"rank-{message['rank']}")
    os.environ.update(message["start"])
    output = channel.descriptors
    if log := message["log"]:
        output = [os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)] * 2
    for source, target in zip(output, (1, 2), strict=False):
        os.dup2(source, target)
    for descriptor in {*output}:
        os.close(descriptor)
    channel.socket.close()
    import numpy

    numpy.random.seed()  # else as in the template, on all ranks


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
