"""Worker processes: they receive tasks, write files, and report progress and errors.

Invariant: what tasks make doesn't depend on the number of processes, nor on which process does what
when. No process outlives its parent, however that ends; none imports torch or the user's script.

Processes are started as `python -c`, not by multiprocessing: that would run the user's script again
in each, which fails for a script without `if __name__ == "__main__"`.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from forescale.ground.errors import UserError

Tick = Callable[[int, int], None]  # called with amounts done since the last call: bytes, tokens
Job = Callable[..., None]  # picklable; writes its results to files

_EVERY = 0.1  # seconds between reports of a worker
_BOOT = "from forescale.data.prepare.pool import serve; serve({fd})"
_PARALLEL = "TOKENIZERS_PARALLELISM"
_ENVIRONMENT = {_PARALLEL: "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Task(NamedTuple):
    """One call `job(*item, tick)`; `label` is for messages; those with more weight start first;
    result: the file that is there when it is done, of which a phase has one of this name."""

    label: str
    job: Job
    item: tuple[Any, ...]
    weight: int
    result: Path


def available() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Runs tasks on up to `workers` processes; with one worker, in this process.

    Processes start when they are needed and stay for the next tasks. Leaving the block kills them.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._idle: list[_Worker] = []
        self._busy: dict[Any, _Worker] = {}  # by the worker's pipe
        self._jobs = 0  # given out so far: a job's number is never reused

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc) -> None:
        everyone = [*self._idle, *self._busy.values()]
        for worker in everyone:
            worker.process.kill()
        for worker in everyone:
            worker.process.wait()
            worker.pipe.close()
        self._idle, self._busy = [], {}

    def run(
        self, tasks: Iterable[Task], tick: Tick, done: Callable[[Task], None] = lambda task: None
    ) -> None:
        """Run all tasks in their order; each is taken once a process is free for it. done: called
        with each that is done.

        Raises the exception of a task; UserError, naming the task, if its process was killed. The
        pool can't be used after an exception.
        """
        if self._workers == 1:
            # tokenizers reads it at each call: in this process, too, it encodes on one core.
            before = os.environ.get(_PARALLEL, "true")  # the value of data/tokenizer.py
            os.environ[_PARALLEL] = "false"
            try:
                run_here(tasks, tick, done)
            finally:
                os.environ[_PARALLEL] = before
            return
        jobs: dict[int, tuple[int, bytes]] = {}  # by id: the number, and the message for the pipe
        todo = iter(tasks)
        while True:
            while len(self._busy) < self._workers and (task := next(todo, None)):
                if id(task.job) not in jobs:
                    self._jobs += 1
                    jobs[id(task.job)] = self._jobs, pickle.dumps((self._jobs, task.job))
                worker = self._idle.pop() if self._idle else _Worker()
                self._busy[worker.pipe] = worker
                worker.begin(task, *jobs[id(task.job)])
            if not self._busy:
                return
            for pipe in wait(list(self._busy)):
                if task := self._busy[pipe].done(tick):
                    self._idle.append(self._busy.pop(pipe))
                    done(task)


def run_here(tasks: Iterable[Task], tick: Tick, done: Callable[[Task], None]) -> None:
    """Run all tasks in this process; done: called with each that is done."""
    for task in tasks:
        task.job(*task.item, tick)
        done(task)


class _Worker:
    """One process as seen by the parent, and its current task."""

    def __init__(self) -> None:
        self.pipe, child = Pipe()
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        with child:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT.format(fd=child.fileno())],
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C reaches only the parent, which ends the workers
            )
        self._task, self._job = Task("", print, (), 0, Path()), 0

    def begin(self, task: Task, number: int, job: bytes) -> None:
        self._task = task
        try:
            if number != self._job:
                self.pipe.send_bytes(job)
                self._job = number
            self.pipe.send((number, task.item))
        except OSError:
            raise self._died() from None

    def done(self, tick: Tick) -> Task | None:
        """Receive a message; return the task if it is finished. Raises its exception."""
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if isinstance(message, MemoryError):
            raise self._no_memory()
        if isinstance(message, BaseException):
            raise message
        if message is None:
            return self._task
        tick(*message)
        return None

    def _died(self) -> UserError:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return self._no_memory()
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        problem = f"its worker process died ({end})"
        return UserError(self._task.label, problem, "run the same command again")

    def _no_memory(self) -> UserError:
        problem = "its worker process was killed, probably because memory ran out"
        return UserError(self._task.label, problem, "run the same command again with fewer workers")


def serve(fd: int) -> None:
    """Main loop of a worker: receive jobs and items, run them, report; end with the parent."""
    pipe, items = Connection(fd), queue.SimpleQueue[bytes]()

    def receive() -> None:
        while True:
            try:
                items.put(pipe.recv_bytes())
            except (EOFError, OSError):
                os._exit(1)

    # In its own thread: the end of the parent must end this process even while it is busy.
    threading.Thread(target=receive, daemon=True).start()
    job: Job | None = None
    known = 0
    while True:
        number, value = pickle.loads(items.get())
        if number != known:
            job, known = value, number
            continue
        assert job is not None
        try:
            reports = _Reports(pipe)
            job(*value, reports)
            reports.send()
            pipe.send(None)
        except BaseException as e:
            if not isinstance(e, UserError | OSError | MemoryError):
                e.add_note(traceback.format_exc())  # of an internal error
            try:
                data = pickle.dumps(e)
                pickle.loads(data)
            except Exception:  # pickling an exception may fail in any way
                data = pickle.dumps(RuntimeError(traceback.format_exc()))
            pipe.send_bytes(data)


class _Reports:
    """Adds up ticks and sends them ten times a second."""

    def __init__(self, pipe: Connection):
        self._pipe, self._sent = pipe, time.monotonic()
        self._bytes = self._tokens = 0

    def __call__(self, size: int, tokens: int) -> None:
        self._bytes += size
        self._tokens += tokens
        if time.monotonic() - self._sent >= _EVERY:
            self.send()

    def send(self) -> None:
        self._pipe.send((self._bytes, self._tokens))
        self._bytes, self._tokens, self._sent = 0, 0, time.monotonic()
