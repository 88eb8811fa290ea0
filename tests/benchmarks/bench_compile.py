"""Our loop on the default model, compiled against not: one engine, and torch's stance in turns."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.pairing import Result, interleaved
from tests.benchmarks.processes import isolated
from tests.benchmarks.sizes import TOY_COMPILED, TrainingSizes


@dataclass(frozen=True)
class Sizes:
    """backend: of torch.compile, None for that of the product."""

    training: TrainingSizes
    backend: str | None


REAL = Sizes(TrainingSizes(), None)
TOY = Sizes(TOY_COMPILED, "eager")  # Dynamo alone: the C++ compiler takes half a minute


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    return [isolated(compare, rounds, sizes)]


def compare(rounds: int, sizes: Sizes) -> Result:
    import torch

    from tests.benchmarks.training import Product, make_job

    with tempfile.TemporaryDirectory() as folder:
        product = Product(make_job(Path(folder), sizes.training, "train.compile=on"))

        def eager() -> float:
            with torch.compiler.set_stance("force_eager"):
                return product(sizes.training.steps)

        def compiled() -> float:
            with torch.compiler.set_stance("default", force_backend=sizes.backend):
                return product(sizes.training.steps)

        rows = interleaved(rounds, compiled, eager)
    return Result("compile, default model", "tokens/s", ("compiled", "eager"), rows)
