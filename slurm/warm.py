"""A step whose tasks are templates (resilience/template.py): each forks its rank for one attempt
after the other, so that a restart needs no new step, no imports and no preflight.

    the supervisor (WarmStep)          a task; each message is a line of JSON
                                   <-  token, rank, host
                                   <-  fault: why it forks no rank, but is one itself; or null
    start: variables, attempt      ->  forks its rank for an attempt
    signal                         ->
                                   <-  pid; later code, and whether memory ran out
    the connection is closed       ->  ends as its rank does

Invariant: only processes with the token are heard. Where a task is not such a template, or is lost,
or doesn't answer, the step ends as one without templates: what srun says of it counts.
"""

import resource
import secrets
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forescale.ground.errors import INTERRUPTED, USER
from forescale.ground.rendezvous import meeting_address
from forescale.resilience import outcome
from forescale.resilience.template import LONGEST, TEMPLATE, Channel
from forescale.slurm.steps import Failure, JobStep

_OTHERS = 1.0  # seconds that other ranks have to end by themselves after a failure
_SAVING = 5.0  # the same after an error of the user's or an interruption
_UNKNOWN = 1 << 12  # bytes of a message whose sender has not shown the token
# Seconds to wait for the report of killed ranks: from templates, which are slow on a busy node; and
# if a task has no template, so that no report may come.
_REPORTED, _LOST = 20.0, 3.0


@dataclass
class _Task:
    """A connection. rank: None until its token is checked; code: of its rank in this attempt."""

    channel: Channel
    rank: int | None = None
    host: str = ""
    is_ready: bool = False
    code: int | None = None


class WarmStep(JobStep):
    """A running srun of `size` templates on these hosts, the first of which is this one."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, hosts: list[str],
        size: int,
    ):  # fmt: skip
        self.hosts, self.size = list(hosts), size
        self._tasks: dict[int, _Task] = {}
        self._reports: list[Failure] = []
        self._order: dict[str, Any] = {}
        self._is_stopped = False
        address, token = meeting_address(hosts[0]), secrets.token_hex(16)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < size + 256:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._token = token
        self._server = socket.create_server((address, 0), family=family, backlog=4096)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        where = f"{address}:{self._server.getsockname()[1]}:{token}"
        super().__init__(command, {**environment, TEMPLATE: where}, log)

    @property
    def is_warm(self) -> bool:
        """True if every task can fork a rank, and none has one."""
        ready = [task for task in self._tasks.values() if task.is_ready and task.code is not None]
        return not self.is_over and len(ready) == self.size

    @property
    def failures(self) -> list[Failure]:
        return self._reports or super().failures

    def train(
        self, attempt: Path, variables: dict[str, str], is_late: Callable[[], bool], job: str
    ) -> int:
        """Run the ranks of an attempt, wait for them, and return 0 if all ended well, else srun's
        code or 1. variables: of their environment. is_late, job: see `wait`."""
        self._reports, failed, is_killed = [], 0.0, False
        for task in self._tasks.values():
            task.code = None
        self._order = {"start": variables, "session": False, "log": None, "attempt": str(attempt)}
        for task in [task for task in self._tasks.values() if task.is_ready]:
            self._start(task)
        while not self.is_over and not is_late():
            self._poll()
            codes = [task.code for task in self._tasks.values() if task.is_ready]
            failures = [code for code in codes if code]
            are_over = bool(codes) and None not in codes
            if are_over and len(codes) == self.size:
                return int(any(failures))
            if are_over or failures:  # those of others may follow, but for tasks without a template
                failed, since = failed or time.monotonic(), time.monotonic()
                patience = _SAVING if {USER, INTERRUPTED} & {*failures} else _OTHERS
                killed = _REPORTED if len(codes) == self.size else _LOST
                if outcome.hang_of(attempt) or since - failed > patience + killed:
                    break
                if since - failed > patience and not is_killed:
                    is_killed = True
                    for task in self._tasks.values():
                        self._signal(task, signal.SIGKILL)
            if self.has_ended_tasks:
                break
        return self.finish(is_late, job)

    def finish(self, is_late: Callable[[], bool], job: str) -> int:
        """Let the tasks end with their ranks, wait for srun, and return its code."""
        for key in [*self._selector.get_map().values()]:
            (key.data.channel.socket if key.data else self._server).close()
        self._selector.close()
        self._tasks.clear()
        return self.wait(is_late, job)

    def request_stop(self) -> None:
        """Send all ranks the signal to save and end."""
        self._is_stopped = True
        for task in [*self._tasks.values()]:
            self._signal(task, signal.SIGUSR1)
        super().request_stop()

    def _start(self, task: _Task) -> None:
        task.channel.send(**self._order, rank=task.rank)
        if self._is_stopped:
            self._signal(task, signal.SIGUSR1)

    def _signal(self, task: _Task, number: int) -> None:
        if task.code is None:
            task.channel.send(rank=task.rank, signal=number)

    def _poll(self) -> None:
        for key, _ in self._selector.select(0.1):
            if key.data is None:
                try:
                    channel = Channel(self._server.accept()[0], _UNKNOWN)
                except OSError:  # it is gone already, or too many files are open
                    time.sleep(0.1)
                    continue
                self._selector.register(channel.socket, selectors.EVENT_READ, _Task(channel))
                continue
            try:
                for message in key.data.channel.receive():
                    self._receive(key.data, message)
            except (EOFError, ValueError, LookupError, TypeError, AttributeError):
                self._selector.unregister(key.data.channel.socket)
                key.data.channel.socket.close()
                self._tasks.pop(key.data.rank, None)

    def _receive(self, task: _Task, message: dict[str, Any]) -> None:
        if task.rank is None:
            if not secrets.compare_digest(message["token"].encode(), self._token.encode()):
                raise ValueError("wrong token")
            task.rank, task.host = int(message["rank"]), message["host"]
            task.channel.longest = LONGEST
            self._tasks[task.rank] = task
        elif "fault" in message:
            task.is_ready = not message["fault"]
            if task.is_ready:
                self._start(task)
        elif "code" in message:
            task.code = message["code"]
            how = "Out Of Memory" if message["memory"] else ""
            # After the loss of a node SLURM ends the ranks of all.
            if task.code and not message["killed"] and not self.lost_node:
                self._reports.append(Failure(task.rank, task.host, task.code, how))
