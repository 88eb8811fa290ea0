"""Starts real ranks for a test: each a process of its own, joined over gloo.

`run("module:function", size, **arguments)` calls the function in every rank and returns rank 0's
result. A rank that fails shows its own traceback.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(scenario: str, size: int, timeout: float = 280, **arguments):
    """scenario: "module:function" beside this file. Returns its JSON result on rank 0."""
    from forescale.rendezvous import free_port

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
                os.pathsep
            ),
        }
        command = [sys.executable, __file__, scenario, json.dumps(arguments), str(out)]
        logs = [open(Path(scratch) / f"rank-{r}.log", "w+b") for r in range(size)]  # noqa: SIM115
        ranks = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=logs[r],
                stderr=subprocess.STDOUT,
            )
            for r in range(size)
        ]
        _wait(ranks, logs, timeout)
        return json.loads(out.read_text())


def _wait(ranks, logs, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    try:
        while any(r.poll() is None for r in ranks):
            failed = next((i for i, r in enumerate(ranks) if r.poll()), None)
            if failed is not None or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if failed is None:
            failed = next((i for i, r in enumerate(ranks) if r.poll() != 0), None)
        if failed is not None:
            logs[failed].seek(0)
            text = logs[failed].read().decode(errors="replace")[-4000:]
            raise AssertionError(f"rank {failed} ended with {ranks[failed].poll()}:\n{text}")
    finally:
        for r in ranks:
            r.kill()
            r.wait()
        for log in logs:
            log.close()


if __name__ == "__main__":
    from forescale.engine.world import set_environment

    set_environment()
    import importlib

    import torch

    torch.set_num_threads(1)
    module, function = sys.argv[1].split(":")
    scenario = importlib.import_module(f"tests.distributed.{module}")
    result = getattr(scenario, function)(**json.loads(sys.argv[2]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[3]).write_text(json.dumps(result))
    os._exit(0)  # as the product does: threads of gloo may abort a normal exit
