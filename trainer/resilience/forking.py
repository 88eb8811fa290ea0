"""A template's own process (template.py): it forks ranks on request, and reports their ends.

Invariant: it forks only while it has one thread and no CUDA driver has begun in it, for nothing of
either would work in a fork.
"""

import ctypes
import os
import select
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from forescale.ground.errors import CRASHED
from forescale.ground.processes import die_with_parent, name_process
from forescale.resilience.outcome import kills_for_memory
from forescale.resilience.rank_log import LOOK, NodeLog
from forescale.resilience.template import TEMPLATE, Channel

_NO_CUDA = 3  # CUDA_ERROR_NOT_INITIALIZED
_CONNECT = 20.0  # seconds to reach the supervisor of a job


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
    parent, server = os.getpid(), _Server(channel)
    if (message := server.run()) is not None:
        _become(channel, message, parent)
        return
    code = server.code
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(parent, -code)
    os._exit(code)


class _Server:
    """The loop of a template. code: how the last rank ended."""

    def __init__(self, channel: Channel):
        self.channel, self.code = channel, 0
        self._ranks = dict[int, int]()  # by process
        self._killed, self._kills = set[int](), kills_for_memory()
        self._logs = dict[int, NodeLog]()  # by rank
        self._is_open, self._is_ending = True, False
        self._ended, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup)
        # Between attempts SIGTERM ends it: SLURM sends that before it waits, and then kills.
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)

    def run(self) -> dict[str, Any] | None:
        """Serve requests. Return None at the end; in a fork, the message that describes its
        rank."""
        incoming = self.channel.socket.fileno()
        while (self._is_open and not self._is_ending) or self._ranks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            sources = [log.source for log in self._logs.values()]
            waits = [self._ended, *sources, *[incoming][: self._is_open]]
            ready, _, _ = select.select(waits, [], [], LOOK if sources else None)
            for log in self._logs.values():
                log.copy() if log.source in ready else log.rotate()
            if self._ended in ready:
                self._reap()
            if incoming not in ready or (self._is_ending and not self._ranks):
                continue
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # in a fork it stays so
            try:
                messages = self.channel.receive()
            except EOFError:
                self._is_open = False
                continue
            for message in messages:
                if "signal" in message:
                    self._signal(message["rank"], message["signal"])
                elif self._forks(message):
                    return message
        return None

    def _reap(self) -> None:
        """Report the ranks that have ended."""
        self._is_ending |= signal.SIGTERM in os.read(self._ended, 1 << 10)
        while self._ranks and (status := os.waitpid(-1, os.WNOHANG))[0]:
            if (rank := self._ranks.pop(status[0], None)) is None:
                continue  # a process that a library started
            code = self.code = os.waitstatus_to_exitcode(status[1])
            if rank in self._logs:
                self._logs.pop(rank).close()
            memory = code == -signal.SIGKILL and kills_for_memory() > self._kills
            self.channel.send(rank=rank, memory=memory, code=code, killed=rank in self._killed)

    def _signal(self, rank: int, number: int) -> None:
        for pid in [pid for pid, each in self._ranks.items() if each == rank]:
            os.kill(pid, number)
            self._killed |= {rank} if number == signal.SIGKILL else set()

    def _forks(self, message: dict[str, Any]) -> bool:
        """Fork the rank that a message describes; return True in the fork."""
        channel, rank = self.channel, message["rank"]
        if attempt := message.get("attempt"):
            path = Path(attempt) / f"node-{os.environ['SLURM_NODEID']}.log"
            log = self._logs[rank] = NodeLog(path, rank, os.environ["LOCAL_RANK"] == "0")
            channel.descriptors += [os.dup(log.end), os.dup(log.end)]
        if pid := os.fork():
            self._killed.discard(rank)
            self._kills = kills_for_memory()
            self._ranks[pid] = rank
            channel.send(rank=rank, pid=pid)
            for descriptor in channel.descriptors:
                os.close(descriptor)
            channel.descriptors.clear()
            return False
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        sources = (log.source for log in self._logs.values())
        for descriptor in (self._ended, self._wakeup, *sources):
            os.close(descriptor)
        return True


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
