"""Our loop's tokens/s against DeepSpeed alone on the same model, batches and optimizer; and what
each of our parts takes.

Both engines are in one process and take turns, so that they share whatever the machine does. The
first rivals are the leanest there are: they neither know the gradient's norm nor clip, as we do.
"""

import tempfile
from pathlib import Path

from tests.benchmarks.pairing import Result, interleaved
from tests.benchmarks.processes import isolated
from tests.benchmarks.sizes import TOY_TRAINING, TrainingSizes

REAL, TOY = (
    TrainingSizes(),
    TOY_TRAINING,
)  # a turn is half a second to a second of the default model
RIVALS = (("adamw", False), ("muon", False), ("adamw", True))  # whether DeepSpeed clips


def measure(rounds: int, sizes: TrainingSizes = REAL) -> list[Result]:
    return [isolated(compare, *rival, rounds, sizes) for rival in RIVALS]


def compare(optimizer: str, clips: bool, rounds: int, sizes: TrainingSizes) -> Result:
    from tests.benchmarks.training import Bare, Product, make_job

    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), sizes, f"optimizer={optimizer}")
        product, bare = Product(job), Bare(job, clips)
        product.watch()
        rows = interleaved(
            rounds, lambda: product(sizes.steps), lambda: bare(sizes.steps), product.forget
        )
        facts = product.facts()
    labels = ("ours", "DeepSpeed that clips" if clips else "bare DeepSpeed")
    return Result(f"loop, {optimizer}", "tokens/s", labels, rows, "at least 0.97", facts)
