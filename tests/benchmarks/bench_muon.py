"""Muon's updates of the default model's matrices, in steps per second of processor time, without
the model: ours (engine/optimizers/orthogonal.py) against DeepSpeed's own one by one, and against
torch.optim.Muon, which also writes the weights.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tests.benchmarks.pairing import Result, interleaved
from tests.benchmarks.processes import isolated

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Sizes:
    """shapes: of the matrices. steps: a turn."""

    shapes: Shapes
    steps: int


# Three layers of width 128, sorted as the optimizer sorts them.
REAL = Sizes((*[(384, 128)] * 6, *[(128, 384)] * 3, *[(128, 128)] * 12), 5)
TOY = Sizes(((8, 8), (8, 8), (24, 8)), 1)


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    return isolated(compare, rounds, sizes)


def compare(rounds: int, sizes: Sizes) -> list[Result]:
    from forescale.engine.optimizers.muon import import_muon, together

    import_muon()
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    momenta = [torch.zeros(shape, dtype=torch.bfloat16) for shape in sizes.shapes]

    def product() -> None:
        with together():
            for gradient, momentum in zip(drawn(sizes.shapes), momenta, strict=True):
                muon_update(gradient, momentum, ns_method="standard")

    def deepspeeds() -> None:
        for gradient, momentum in zip(drawn(sizes.shapes), momenta, strict=True):
            muon_update.original(gradient, momentum, ns_method="standard")

    weights = [nn.Parameter(torch.zeros(shape)) for shape in sizes.shapes]
    optimizer = torch.optim.Muon(weights)

    def torchs() -> None:
        for weight, gradient in zip(weights, drawn(sizes.shapes), strict=True):
            weight.grad = gradient.float()
        optimizer.step()

    results = []
    with torch.no_grad():
        for name, other in (("DeepSpeed, one by one", deepspeeds), ("torch.optim.Muon", torchs)):
            sides = (rate(one, sizes.steps) for one in (product, other))
            rows = interleaved(rounds, *sides)
            results.append(Result("muon", "steps/s of processor time", ("ours", name), rows))
    return results


def drawn(shapes: Shapes) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]


def rate(step: Callable[[], None], steps: int) -> Callable[[], float]:
    """A turn of `steps`, which returns how many fit into a second of processor time."""

    def turn() -> float:
        began = time.process_time()
        for _ in range(steps):
            step()
        return steps / (time.process_time() - began)

    return turn
