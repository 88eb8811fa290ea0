"""Rehearsals as forks of a process that has loaded the pretended device, torch and its compiler,
which is a third of what one costs. Cold ones are in `test_two_shallow_depths`.
"""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

from tests import warm


class RankFork(warm.Fork):
    """A rank, started as its rehearsal starts it, but by a fork."""

    def __init__(self, command, stdin, stdout, stderr, errors):
        from forescale.rehearsal import rank

        (request, writes), (reads, says) = os.pipe(), os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            warm.become(dict(os.environ), stdout.fileno(), says, request)
            sys.stdin = os.fdopen(request)
            warm.finish(rank.main)
        os.close(request)
        os.close(says)
        self.stdin, self.stderr = os.fdopen(writes, "w"), os.fdopen(reads, errors=errors)


def keep(request: dict, answer: socket.socket, output: int, errors: int) -> None:
    """Be the command line of a rehearsal in a fork, and answer with its code."""
    from forescale import cli
    from forescale.rehearsal import rehearsal

    if not (pid := os.fork()):
        answer.close()
        warm.become(dict(os.environ), output, errors)
        os.chdir(request["folder"])
        sys.argv = ["forescale", *request["words"]]
        rehearsal.subprocess = SimpleNamespace(Popen=RankFork, PIPE=subprocess.PIPE)
        warm.finish(cli.main)
    answer.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


def load() -> None:
    from forescale.rehearsal import library

    library.load(library.library())
    library.load = lambda built: None

    import forescale.rehearsal.config
    import forescale.rehearsal.rehearsal
    import forescale.verbs.rehearse  # noqa: F401


if __name__ == "__main__":
    warm.serve(socket.socket(fileno=int(sys.argv[1])), load)
