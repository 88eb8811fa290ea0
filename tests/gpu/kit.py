"""Runs parts of the kit for GPUs, each in a process of its own with a limit of time: on the GPUs
of this machine ("cuda"), on its CPU ("cpu"), or on a pretended GPU ("pretended").

A part is a function of a Place. Tensors of a pretended GPU have no values, so a Place compares
their shapes alone. Invariant: a part that fails, crashes or takes too long is an Outcome with a
sentence, and the other parts run.
"""

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forescale.ground.rendezvous import free_port

ROOT = Path(__file__).parents[2]
PLACES = ("cuda", "cpu", "pretended")
_START = 60  # seconds until the libraries of a machine at work are imported
_PRETENDED = 8  # GPUs of the pretended node
VISIBLE = "FORESCALE_GPUS"  # the variable with the GPUs that the user let the tests see


@dataclass(frozen=True)
class Part:
    """function: "module:function" below tests; it receives a Place and the arguments. ranks: the
    processes that call it, each on a GPU of its own; the first one's value counts."""

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1


@dataclass(frozen=True)
class Outcome:
    """value: what the part returned, of JSON's types; problem: why there is none; seconds: that its
    process took."""

    value: Any
    problem: str | None
    seconds: float


class Place:
    """Where a part runs. device: of its tensors; has_values: whether these can be compared."""

    def __init__(self, kind: str, scratch: Path):
        import torch

        self.kind, self.scratch = kind, scratch
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.on_gpu, self.has_values = kind != "cpu", kind != "pretended"
        index = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", index) if self.on_gpu else torch.device("cpu")

    def equal(self, value: Any, expected: Any, label: str = "") -> None:
        """Compare two tensors, bit for bit."""
        self.close(value, expected, 0.0, label)

    def close(self, value: Any, expected: Any, error: float, label: str = "") -> None:
        """Compare two tensors, anywhere: the norm of the difference may be `error` times the norm
        of what is expected."""
        assert value.shape == expected.shape, (label, value.shape, expected.shape)
        difference = self.error(value, expected)
        assert difference <= error, f"{label}: off by {difference:.2e}, at most {error:.2e}"

    def error(self, value: Any, expected: Any) -> float:
        """Return the norm of the difference of two tensors, over the norm of what is expected; 0
        without values."""
        if not self.has_values:
            return 0.0
        value, expected = (t.detach().cpu().double() for t in (value, expected))
        norm = float(expected.norm())
        return float((value - expected).norm()) / norm if norm else float(value.norm())

    def holds(self, condition: Callable[[], Any], label: Any = "") -> None:
        """Assert what is true of values alone."""
        assert not self.has_values or condition(), label

    def wait(self) -> None:
        """Wait until the GPU has done all of it."""
        if self.kind == "cuda":
            import torch

            torch.cuda.synchronize()


def run(place: str, parts: list[Part], limit: int) -> list[Outcome]:
    """Return the outcomes of parts, one after the other. limit: seconds of a part, its start
    included."""
    if place == "cuda":  # a process that has used CUDA can't be forked
        return [_run(place, [part], limit, limit)[0] for part in parts]
    return _run(place, parts, limit, _START + limit * len(parts))


def _run(place: str, parts: list[Part], limit: int, whole: int) -> list[Outcome]:
    began, ranks = time.monotonic(), parts[0].ranks if place == "cuda" else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = [place, name, limit, [vars(part) for part in parts]]
        command = [sys.executable, "-P", "-m", "tests.gpu.kit", json.dumps(request)]
        common = environment(place) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        processes: list[subprocess.Popen] = []
        try:
            for rank in map(str, range(ranks)):
                env = common | {"RANK": rank, "LOCAL_RANK": rank}
                with open(folder / f"log-{rank}", "wb") as log:
                    how: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                    # In a session of its own: it is killed with all that it starts.
                    how |= {"env": env, "cwd": name, "start_new_session": True}
                    processes.append(subprocess.Popen(command, **how))
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, began + whole - time.monotonic()))
            is_late = any(process.poll() is None for process in processes)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        codes = [process.returncode for process in processes]
        end = f"took over {limit} s" if is_late else f"ended with {codes}"
        return [_outcome(folder, i, end, time.monotonic() - began) for i in range(len(parts))]


def _outcome(folder: Path, i: int, end: str, seconds: float) -> Outcome:
    """Return the outcome of a part. end: how its processes ended; seconds: of all of it."""
    for problem in sorted(folder.glob(f"problem-{i}-*"), key=lambda p: p.stat().st_mtime_ns):
        return Outcome(None, problem.read_text(), seconds)
    if (answer := folder / f"answer-{i}").exists():
        return Outcome(json.loads(answer.read_text())[0], None, seconds)
    log = "".join(p.read_text(errors="replace") for p in sorted(folder.glob("log-*")))
    return Outcome(None, f"{end}:\n{log[-3000:]}", seconds)


def environment(place: str) -> dict[str, str]:
    """Return the environment of processes at a place."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    every = {**os.environ, "PYTHONPATH": path}
    if place == "cpu":
        return every | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if visible := every.get(VISIBLE):
        every |= {"CUDA_VISIBLE_DEVICES": visible}
        if visible == "all":
            del every["CUDA_VISIBLE_DEVICES"]
    return every


def main() -> None:
    """Serve the request of this process: on a GPU in itself, else each part in forks."""
    place, name, limit, every = json.loads(sys.argv[1])
    folder, parts = Path(name), [Part(**part) for part in every]
    if place == "cuda":
        signal.alarm(limit)
        os._exit(_serve(place, folder, 0, parts[0], limit))
    rehearsal = _pretended() if place == "pretended" else None
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401

    import forescale.train.trainer  # noqa: F401
    from forescale.rehearsal.kernels import leave_out_kernels

    leave_out_kernels()  # only a GPU has some; the graphs of torch's compiler run
    for i, part in enumerate(parts):
        ranks = part.ranks if place == "cpu" else 1
        os.environ.update(WORLD_SIZE=str(part.ranks), LOCAL_WORLD_SIZE=str(part.ranks))
        os.environ["MASTER_PORT"] = str(free_port())
        forks = []
        for rank in range(ranks):
            if not (pid := os.fork()):
                signal.alarm(limit)
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                os._exit(_serve(place, folder, i, part, limit, rehearsal))
            forks.append(pid)
        for rank, pid in enumerate(forks):
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code < 0:
                why = f"took over {limit} s" if code == -signal.SIGALRM else f"ended with {code}"
                log = (folder / "log-0").read_text(errors="replace")[-3000:]
                (folder / f"problem-{i}-{rank}").write_text(f"{why}:\n{log}")
    os._exit(0)


def _serve(place: str, folder: Path, i: int, part: Part, limit: int, rehearsal: Any = None) -> int:
    """Call a part and leave its answer."""
    rank, scratch = os.environ["RANK"], folder / f"scratch-{i}"
    faulthandler.dump_traceback_later(limit - 2)  # shows where one hangs
    try:
        module, name = part.function.split(":")
        scratch.mkdir(exist_ok=True)
        from forescale.engine import world

        if rehearsal is None:
            world.set_environment()
        here = Place(place, scratch)

        def call() -> Any:
            return getattr(importlib.import_module(f"tests.{module}"), name)(here, **part.arguments)

        value = call() if rehearsal is None else _without_values(rehearsal, part.ranks, call)
        if rank == "0":
            (folder / f"answer-{i}").write_text(json.dumps([value]))
        return 0
    except BaseException:
        (folder / f"problem-{i}-{rank}").write_text(traceback.format_exc(limit=-12))
        return 1


def _pretended() -> Any:
    """Let this process believe in GPUs; torch is imported here for the first time. Returns the
    rehearsal whose device, group and compiler the parts get."""
    from dataclasses import asdict

    from forescale.config.compose import compose
    from forescale.config.frozen import freeze
    from forescale.plan.gpu import gpu_of
    from forescale.rehearsal.config import RehearseJob
    from forescale.rehearsal.library import library, load
    from forescale.rehearsal.rank import Rehearsal, Request, set_environment

    words = [f"plan.gpus={_PRETENDED}", f"train.global_batch={_PRETENDED}", "train.micro_batch=1"]
    job = compose(RehearseJob, [*words, "machine=h100-sxm", "rehearse.kernels=off"])
    gpu = gpu_of(job.machine.name, job.machine.memory_bytes or 0, _PRETENDED)
    assert gpu is not None
    request = Request(freeze(job), 100, 0, 1, False, str(library()), asdict(gpu))
    set_environment(request, _PRETENDED)
    load(Path(request.library))
    return Rehearsal(request)


def _without_values(rehearsal: Any, ranks: int, call: Callable[[], Any]) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from forescale.engine import world

    rehearsal.size = ranks
    rehearsal._join()
    world.set_environment()
    world.compare_nothing()
    with FakeTensorMode(allow_non_fake_inputs=True), rehearsal.observer:
        return call()


if __name__ == "__main__":
    main()
