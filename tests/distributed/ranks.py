"""Starts real ranks for a test: each a process of its own, joined over gloo.

`run("module:function", size, **arguments)` calls the function in every rank and returns rank 0's
result. A rank that fails shows its own traceback.

To import torch and DeepSpeed often costs more than a scenario itself. So a process for each worker
of the tests imports them once, and the ranks are its forks. They share a seed of hashes: that ranks
agree where theirs differ, the tests of whole runs show, whose launcher starts each from nothing.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
_server: subprocess.Popen | None = None  # whose forks the ranks are


def run(scenario: str, size: int, timeout: float = 280, **arguments):
    """scenario: "module:function" beside this file. Returns its JSON result on rank 0."""
    from forescale.ground.rendezvous import free_port

    server = _started()
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            **FIXED,
        }
        request = {
            "scenario": scenario,
            "arguments": arguments,
            "environment": environment,
            "timeout": timeout,
            "scratch": scratch,
        }
        try:
            print(json.dumps(request), file=server.stdin, flush=True)
            answer = server.stdout.readline()
        except BaseException:  # the test's own timeout, too
            _end()
            raise
        if answer != "done\n":
            _end()
            raise AssertionError(f"the process that starts the ranks has ended: {answer}")
        failure = Path(scratch) / "failure.txt"
        if failure.exists():
            raise AssertionError(failure.read_text())
        return json.loads((Path(scratch) / "result.json").read_text())


FIXED = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}  # read while torch is imported


def _started() -> subprocess.Popen:
    """The server of this process, which waits for what is asked."""
    global _server
    if _server is None or _server.poll() is not None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        _server = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **FIXED, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # ended with its ranks
        )
        atexit.register(_server.communicate)  # the end of what is asked ends it
    return _server


def _end() -> None:
    with suppress(ProcessLookupError):
        os.killpg(_server.pid, signal.SIGKILL)
    _server.wait()


def serve() -> None:
    """Fork the ranks of whatever a line of the input asks for, and say when all have ended."""
    from forescale.engine.world import set_environment

    set_environment()
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401
    import torch
    import torch._dynamo  # any optimizer imports it: a second of each rank

    import forescale.train.trainer  # noqa: F401
    from forescale.config.compose import compose
    from forescale.config.train import TrainJob
    from forescale.engine.optimizers.muon import import_muon

    import_muon()
    compose(TrainJob, [])  # what composes configurations imports its parts when it is first called
    torch.set_num_threads(1)
    gc.freeze()  # what is imported lives on: a collection in a rank took longer than a step
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        failure = _failure(request)
        if failure:
            (Path(request["scratch"]) / "failure.txt").write_text(failure)
        print("done", file=answers, flush=True)


def _failure(request: dict) -> str:
    """Run a scenario on all its ranks; return what the first that failed says, or ""."""
    scratch, size = Path(request["scratch"]), int(request["environment"]["WORLD_SIZE"])
    deadline = time.monotonic() + request["timeout"]
    ranks = {}
    for rank in range(size):
        ranks[rank] = os.fork()
        if not ranks[rank]:
            _rank(rank, request)
    ended: dict[int, int] = {}
    while len(ended) < size and not any(ended.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
        for rank in ranks.keys() - ended.keys():
            pid, status = os.waitpid(ranks[rank], os.WNOHANG)
            if pid:
                ended[rank] = os.waitstatus_to_exitcode(status)
    failed = next((rank for rank, code in ended.items() if code), None)
    late = ranks.keys() - ended.keys()
    for rank in late:
        os.kill(ranks[rank], signal.SIGKILL)
        os.waitpid(ranks[rank], 0)
    if failed is None and late:
        failed = min(late)
    if failed is None:
        return ""
    code = ended.get(failed)
    how = "did not end in time" if code is None else f"ended with {code}"
    text = (scratch / f"rank-{failed}.log").read_text(errors="replace")[-4000:]
    return f"rank {failed} {how}:\n{text}"


def _rank(rank: int, request: dict) -> None:
    """Be a rank, in a fork; never returns."""
    import importlib

    try:
        log = os.open(Path(request["scratch"]) / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY)
        for source, other in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(source, other)
        os.environ.clear()
        os.environ.update(request["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
        from forescale.engine.world import set_environment

        set_environment()
        module, function = request["scenario"].split(":")
        scenario = importlib.import_module(f"tests.distributed.{module}")
        result = getattr(scenario, function)(**request["arguments"])
        if not rank:
            (Path(request["scratch"]) / "result.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the product does: threads of gloo may abort a normal exit


if __name__ == "__main__":
    serve()
