"""Our loop's tokens/s against a loop of torch alone, as nanoGPT's, on the default job: the same
model, batches in memory, fused AdamW or torch's Muon, clipping, torch.compile (plain.py), in the
number format that this machine multiplies fast.

Ours writes its rows, guards each step and takes batches from the prepared corpus. Each side is in a
process of its own, because what one compiles would bind the other's compiler; they take turns.
"""

import tempfile
from pathlib import Path

from forescale.config.hardware import native_precision
from tests.benchmarks.bench_peer import product
from tests.benchmarks.pairing import Clocks, Result, by_both_clocks, interleaved
from tests.benchmarks.processes import Side
from tests.benchmarks.sizes import TOY_TRAINING, TrainingSizes

REAL, TOY = TrainingSizes(), TOY_TRAINING
RIVALS = (("adamw", "autocast"), ("adamw", "masters"), ("muon", "masters"))


def measure(rounds: int, sizes: TrainingSizes = REAL) -> list[Result]:
    return [result for rival in RIVALS for result in compare(*rival, rounds, sizes)]


def compare(optimizer: str, way: str, rounds: int, sizes: TrainingSizes) -> list[Result]:
    word = f"optimizer={optimizer}"
    with Side(product, sizes, word) as a, Side(rival, sizes, way, word) as b:
        rows = interleaved(rounds, a, b)
    labels = ("ours", f"plain PyTorch, {way}")
    name = f"plain, {optimizer}, {way}, {native_precision()}"
    return by_both_clocks(name, labels, rows, "at least 0.95")


def rival(turn, sizes: TrainingSizes, way: str, *overrides: str) -> None:
    """The plain loop over the job with these overrides, in turns."""
    from tests.benchmarks.plain import Plain
    from tests.benchmarks.training import make_job

    with tempfile.TemporaryDirectory() as folder:
        loop = Plain(make_job(Path(folder), sizes, *overrides), way)
        turn()
        clocks = Clocks()
        while True:
            clocks.begin()
            turn(clocks.rates(loop(sizes.steps)))
