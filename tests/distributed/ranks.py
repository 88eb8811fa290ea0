"""Starts real ranks for a test: each a process of its own, joined over gloo.

`run("module:function", size, **arguments)` calls the function in every rank and returns rank 0's
result. A rank that fails shows its own traceback. Ranks are forks (tests/warm.py).
"""

import importlib
import json
import os
import signal
import socket
import tempfile
import time
from functools import partial
from pathlib import Path

from tests import warm


def run(scenario: str, size: int, timeout: float = 840, **arguments):
    """scenario: "module:function" beside this file. Returns its JSON result on rank 0."""
    from forescale.ground.rendezvous import free_port

    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        request = {
            "serve": "tests.distributed.ranks:keep",
            "scenario": scenario,
            "arguments": arguments,
            "environment": environment,
            "timeout": timeout,
            "scratch": scratch,
        }
        with warm.ask(request) as answer, answer.makefile() as lines:
            failure = lines.read()
        assert not failure, failure
        return json.loads((Path(scratch) / "result.json").read_text())


def keep(request: dict, answer: socket.socket) -> None:
    """Run a scenario on all its ranks, and answer what the first that failed says, or nothing."""
    scratch, size = Path(request["scratch"]), int(request["environment"]["WORLD_SIZE"])
    deadline = time.monotonic() + request["timeout"]
    ranks = {}
    for rank in range(size):
        ranks[rank] = os.fork()
        if not ranks[rank]:
            warm.finish(partial(_rank, rank, request))
    ended: dict[int, int] = {}
    while len(ended) < size and not any(ended.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
        for rank in ranks.keys() - ended.keys():
            pid, status = os.waitpid(ranks[rank], os.WNOHANG)
            if pid:
                ended[rank] = os.waitstatus_to_exitcode(status)
        if _is_given_up(answer):  # by the test's own timeout
            break
    failed = next((rank for rank, code in ended.items() if code), None)
    late = ranks.keys() - ended.keys()
    for rank in late:
        os.kill(ranks[rank], signal.SIGKILL)
        os.waitpid(ranks[rank], 0)
    if failed is None and late:
        failed = min(late)
    if failed is not None and not _is_given_up(answer):
        code = ended.get(failed)
        how = "did not end in time" if code is None else f"ended with {code}"
        text = (scratch / f"rank-{failed}.log").read_text(errors="replace")[-4000:]
        answer.sendall(f"rank {failed} {how}:\n{text}".encode())


def _is_given_up(answer: socket.socket) -> bool:
    try:
        return not answer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


def _rank(rank: int, request: dict) -> int:
    """Be a rank, in a fork."""
    log = os.open(Path(request["scratch"]) / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY)
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    warm.become({**request["environment"], **environment}, log, log)
    import torch._dynamo.config as dynamo

    from forescale.engine.world import set_environment

    set_environment()
    dynamo.disable = True  # a scenario that compiles sets it to False
    module, function = request["scenario"].split(":")
    scenario = importlib.import_module(f"tests.distributed.{module}")
    try:
        result = getattr(scenario, function)(**request["arguments"])
    except SystemExit as e:  # else an end with 0 would pass for the end of the scenario
        raise AssertionError(f"rank {rank} ended itself with {e.code}") from e
    if not rank:
        (Path(request["scratch"]) / "result.json").write_text(json.dumps(result))
    return 0
