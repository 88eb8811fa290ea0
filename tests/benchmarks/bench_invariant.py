"""What the same bits on any number of ranks cost: steps with `train.invariant` against steps
without it that add gradients in fp32 too.

Both engines are in one process and take turns.
"""

import tempfile
from functools import partial
from pathlib import Path

from tests.benchmarks.pairing import Result, interleaved
from tests.benchmarks.processes import isolated
from tests.benchmarks.sizes import TOY_TRAINING, TrainingSizes

REAL, TOY = TrainingSizes(), TOY_TRAINING
SAME = ("train.compile=off", "train.micro_batch=2", "engine.gradient_dtype=fp32")


def measure(rounds: int, sizes: TrainingSizes = REAL) -> list[Result]:
    return [isolated(compare, optimizer, rounds, sizes) for optimizer in ("adamw", "muon")]


def compare(optimizer: str, rounds: int, sizes: TrainingSizes) -> Result:
    from accelerate.state import AcceleratorState

    from tests.benchmarks.training import Product, make_job

    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for name in ("true", "false"):
            AcceleratorState._reset_state()  # of the engine before
            words = (f"run.name={name}", f"train.invariant={name}", f"optimizer={optimizer}")
            sides.append(Product(make_job(Path(folder), sizes, *SAME, *words)))
        a, b = (partial(side, sizes.steps) for side in sides)
        rows = interleaved(rounds, a, b)
    labels = ("invariant", "order of ranks")
    return Result(f"invariant, {optimizer}", "tokens/s", labels, rows, "at least 0.9")
