"""Our loop on the default model, compiled against not: one engine, and torch's stance in turns."""

import tempfile
from pathlib import Path

from tests.benchmarks.pairing import Result, interleaved
from tests.benchmarks.processes import isolated

STEPS = 10


def measure(rounds: int) -> list[Result]:
    return [isolated(compare, rounds)]


def compare(rounds: int) -> Result:
    import torch

    from tests.benchmarks.training import Ours, make_job

    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(make_job(Path(folder), "train.compile=on"))

        def eager() -> float:
            with torch.compiler.set_stance("force_eager"):
                return ours(STEPS)

        rows = interleaved(rounds, lambda: ours(STEPS), eager)
    return Result("compile, default model", "tokens/s", ("compiled", "eager"), rows)
