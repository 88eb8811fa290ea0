"""Peak memory of our loop against DeepSpeed alone: each in a process of its own, from its start to
the end of a few steps. The default model, and one whose weights and moments outweigh the libraries.
"""

import tempfile
from pathlib import Path

from tests.benchmarks.pairing import Result
from tests.benchmarks.processes import isolated, peak_memory

LARGER = ("model=depth", "model.depth=8", "optimizer=adamw", "train.compile=off")
MODELS = {"default model": (12, ()), "depth 8": (2, LARGER)}


def measure(rounds: int) -> list[Result]:
    """A number that hardly varies: two rounds at most."""
    results = []
    for name, (steps, overrides) in MODELS.items():
        pairs = [
            tuple(isolated(peak, loop, steps, overrides) for loop in ("Ours", "Bare"))
            for _ in range(min(rounds, 2))
        ]
        labels = ("ours", "bare DeepSpeed")
        results.append(Result(f"peak memory, {name}", "MB", labels, pairs, "at most 1.05"))
    return results


def peak(loop: str, steps: int, overrides: tuple[str, ...]) -> float:
    """MB that a process has resident at most when it trains so."""
    from tests.benchmarks import training

    with tempfile.TemporaryDirectory() as folder:
        getattr(training, loop)(training.make_job(Path(folder), *overrides))(steps)
    return peak_memory() / 1e6
