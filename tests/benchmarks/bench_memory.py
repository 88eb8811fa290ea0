"""Peak memory of our loop against DeepSpeed alone: each in a process of its own, from its start to
the end of a few steps. The default model, and one whose weights and moments outweigh the libraries.
"""

import tempfile
from pathlib import Path

from tests.benchmarks.pairing import Result
from tests.benchmarks.processes import isolated, peak_memory
from tests.benchmarks.sizes import TOY_TRAINING, TrainingSizes

_LARGER = ("model=depth", "model.depth=8", "optimizer=adamw", "train.compile=off")
REAL = {"default model": TrainingSizes(12), "depth 8": TrainingSizes(2, _LARGER)}
TOY = {"toy": TOY_TRAINING}


def measure(rounds: int, sizes: dict[str, TrainingSizes] = REAL) -> list[Result]:
    """A number that hardly varies: two rounds at most."""
    results = []
    for name, training in sizes.items():
        pairs = [
            tuple(isolated(peak, loop, training) for loop in ("Product", "Bare"))
            for _ in range(min(rounds, 2))
        ]
        labels = ("ours", "bare DeepSpeed")
        results.append(Result(f"peak memory, {name}", "MB", labels, pairs, "at most 1.05"))
    return results


def peak(loop: str, sizes: TrainingSizes) -> float:
    """MB that a process has resident at most when it trains so."""
    from tests.benchmarks import training

    with tempfile.TemporaryDirectory() as folder:
        getattr(training, loop)(training.make_job(Path(folder), sizes))(sizes.steps)
    return peak_memory() / 1e6
