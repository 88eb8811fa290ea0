"""A process that has imported torch and DeepSpeed, whose forks are launchers and ranks of a test.

These imports often cost more than what a test trains. Forks share a seed of hashes: that ranks and
attempts agree where theirs differ, the tests show whose `launching.start` is `cold`.

A request is JSON and some file descriptors, the first of them a socket for the answer. A keeper, a
fork of its own, serves it: so that a process whose end nobody has waited for yet keeps its number.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

ROOT = Path(__file__).parents[1]


@cache
def server(program: str = __file__, folder: str = "", **variables: str) -> socket.socket:
    """The socket of a server of this process. folder: the first on its search path."""
    client, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = os.pathsep.join(filter(None, [folder, str(ROOT), os.environ.get("PYTHONPATH")]))
    server = subprocess.Popen(
        [sys.executable, "-P", program, str(end.fileno())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables},
        stdin=subprocess.DEVNULL,
        pass_fds=[end.fileno()],
        start_new_session=True,  # ended with its forks
    )
    end.close()
    atexit.register(server.wait)
    atexit.register(client.close)  # before that: it ends the server
    return client


def ask(request: dict, *descriptors: int, of: socket.socket | None = None) -> socket.socket:
    """Send a request ("serve": module:function, which a keeper calls with the request and the file
    descriptors) to a server; return the socket of its answer."""
    answer, end = socket.socketpair()
    with end:
        fds = [end.fileno(), *descriptors]
        socket.send_fds(of or server(), [json.dumps(request).encode()], fds)
    return answer


def load() -> None:
    """Import what ranks import."""
    from forescale.engine.world import set_environment

    before = dict(os.environ)
    set_environment()
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo  # any optimizer imports it: a second of each rank

    import forescale.inference.summary
    import forescale.train.trainer
    import forescale.verbs.train  # noqa: F401
    from forescale.config.compose import compose
    from forescale.config.train import TrainJob
    from forescale.engine.optimizers.muon import import_muon

    import_muon()
    # What composes configurations imports its parts when it is first called, and keeps files.
    for stage, optimizer in product(range(4), ("muon", "adamw")):
        compose(TrainJob, [f"engine=zero{stage}", f"optimizer={optimizer}"])
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(before)


def serve(requests: socket.socket, load: Callable[[], None] = load) -> None:
    """Fork a keeper for each request until the test process ends."""
    load()
    gc.collect()
    gc.freeze()  # what is imported lives on: a collection in a rank took longer than a step
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 8)
        if not message:
            os.killpg(0, signal.SIGKILL)
        if not os.fork():
            requests.close()
            finish(partial(_keep, json.loads(message), descriptors))
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(request: dict, descriptors: list[int]) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    answer = socket.socket(fileno=descriptors.pop(0))
    module, function = request["serve"].split(":")
    getattr(importlib.import_module(module), function)(request, answer, *descriptors)
    return 0


def finish(work: Callable[[], int]) -> NoReturn:
    """Call `work` in a fork and end with its code; as the product ends a rank, because threads of
    gloo may abort a normal exit."""
    try:
        code = work()
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def become(environment: dict[str, str], stdout: int, stderr: int, *others: int) -> None:
    """Take what a new process has of its own: environment, output, signals, search path. others:
    descriptors that stay open."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
    for low, high in pairwise([2, *sorted(others), 1024]):
        os.closerange(low + 1, high)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [entry for entry in path if entry and entry not in sys.path]


def _command(words: list[str]) -> int:
    """The command line `forescale WORDS`, whose template is a fork of this process."""
    from forescale import cli
    from forescale.resilience import template

    template.subprocess = SimpleNamespace(Popen=Fork, DEVNULL=None)  # type: ignore[assignment]
    sys.argv = ["forescale", *words]
    return cli.main()


def launch(request: dict, answer: socket.socket, output: int) -> None:
    """Keep a launcher: answer with its number, and with its code when it has ended."""
    if not (launcher := os.fork()):
        answer.close()
        become(request["environment"], output, output)
        os.chdir(request["folder"])
        finish(lambda: _command(request["words"]))
    os.close(output)
    answer.sendall(f"{launcher}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
    answer.sendall(f"{code}\n".encode())


class _Child:
    """What the product asks of a Popen."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        raise NotImplementedError

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Fork(_Child):
    """A template, started as its launcher starts it, but by a fork."""

    def __init__(
        self, command, env, pass_fds, preexec_fn, stdin, stdout, stderr, start_new_session
    ):
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            preexec_fn()
            nothing = os.open(os.devnull, os.O_WRONLY)
            become(env, nothing, nothing, *pass_fds)
            finish(lambda: _command(command[command.index("forescale") + 1 :]))

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def wait(self, options: int = 0) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class Launcher(_Child):
    """`forescale WORDS` in a fork of the server, as a Popen that reads its output, or writes it
    into an open file."""

    def __init__(
        self, words: list[str], folder: Path, environment: dict[str, str], output: int | None = None
    ):
        read, write = (None, output) if output is not None else os.pipe()
        request = {"words": words, "folder": str(folder), "environment": environment}
        self._answer = ask({"serve": "tests.warm:launch", **request}, write).makefile()
        if read is not None:
            os.close(write)
            self.stdout = os.fdopen(read)
        self.pid = int(self._answer.readline())
        self._ended = threading.Event()
        self._output: list[str] = []
        self._reader: threading.Thread | None = None
        threading.Thread(target=self._await_end, daemon=True).start()

    def _await_end(self) -> None:
        self.returncode = int(self._answer.readline() or -signal.SIGKILL)
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Return the output; what came before an earlier TimeoutExpired is in it."""
        if self._reader is None:
            read = lambda: self._output.append(self.stdout.read())  # noqa: E731
            self._reader = threading.Thread(target=read, daemon=True)
            self._reader.start()
        self._reader.join(timeout)
        if self._reader.is_alive() or not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("forescale", timeout or 0.0)
        return self._output[0], None


if __name__ == "__main__":
    from tests import warm

    warm.serve(socket.socket(fileno=int(sys.argv[1])))
