"""Processes of their own for what must not share one: engines, peers, peak memory.

A fresh interpreter each, which prints nothing on the terminal; where it fails, its traceback and
the end of what it printed are raised here. After `share_imports` each is forked from one process
that has imported the libraries and nothing else: sooner there, but its peak memory includes them.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

_context: Any = multiprocessing.get_context("spawn")
_LIBRARIES = ("torch._dynamo", "deepspeed", "forescale.train.trainer", "forescale.verbs.train")


def share_imports() -> None:
    """Fork the processes to come from one that has imported the libraries, for measurements in
    which neither time nor memory counts."""
    global _context
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(list(_LIBRARIES))


class Side:
    """`function(turn, *arguments)` in a process of its own, which works when it is called.

    Whenever the function calls `turn(value)`, `value` is the answer to the call that it works for,
    and it waits for the next one. Its first `turn()` says that it is set up.
    """

    def __init__(self, function: Callable, *arguments: Any):
        self._pipe, far_end = _context.Pipe()
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed in close
        arguments = (far_end, self._log.name, function, arguments)
        self._process = _context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        far_end.close()
        self._answer()

    def __call__(self) -> Any:
        self._pipe.send(None)
        return self._answer()

    def _answer(self) -> Any:
        try:
            fault, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            fault, value = f"ended with code {self._process.exitcode}", None
        if fault:
            with open(self._log.name, errors="replace") as log:
                raise RuntimeError(f"{fault}\nIt had printed:\n{log.read()[-4000:]}")
        return value

    def close(self) -> None:
        """End the process: it is told to, and killed where it doesn't listen."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()
        self._log.close()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def isolated(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` in a fresh process, which then ends."""
    with Side(_once, function, arguments) as side:
        return side()


def _once(turn: Callable, function: Callable, arguments: tuple) -> None:
    turn()
    turn(function(*arguments))


def _serve(pipe, log: str, function: Callable, arguments: tuple) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())

    def turn(value: Any = None) -> None:
        pipe.send((None, value))
        pipe.recv()

    try:
        function(turn, *arguments)
    except EOFError:  # nobody asks any more
        pass
    except BaseException:
        pipe.send((traceback.format_exc(), None))


def peak_memory() -> int:
    """Bytes that this process has had resident at most. Linux; unlike getrusage's, the number
    doesn't begin with what the parent had."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmHWM"].split()[0]) * 1024
