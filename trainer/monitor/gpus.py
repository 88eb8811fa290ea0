"""What the GPUs of a machine do when they are tried: free memory, a product of matrices, and copies
from each to the next.

Invariant: each GPU is tried, also after another has failed, and a problem names it by its index.
Imports torch only when it is asked for the GPUs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median_high
from typing import Any, Protocol

_GIB = 2**30
_FREE = 0.9  # of a GPU's memory, and a GiB for our context: less means that another process uses it
_SLOW = 1.5  # times slower than the median of its node: the clock of a hot GPU is lowered
_SLOW_LINK = 3.0  # pairs of one node may have links of different kinds
_SIZE = 8192  # of the matrices: in fp16 a product of ones is exact
_BYTES = 1 << 26  # of a copy
_REPEATS = 3


class Gpus(Protocol):
    """The GPUs that this process sees. A method raises RuntimeError if a GPU fails."""

    names: list[str]

    def memory(self, i: int) -> tuple[int, int]:
        """Return the free bytes and all bytes of a GPU."""

    def multiply(self, i: int) -> float:
        """Return FLOP/s of a product of matrices. Raises RuntimeError if it is wrong."""

    def copy(self, i: int, j: int) -> float:
        """Return bytes/s of a copy between two GPUs. Raises RuntimeError if it arrives changed."""


@dataclass
class Trial:
    """The result. flops: FLOP/s by index; links: bytes/s by pair of indices; problems: a sentence
    each, which begins with the GPU."""

    flops: dict[int, float] = field(default_factory=dict)
    links: dict[tuple[int, int], float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The speeds, in a few words: of the slowest and the fastest."""
        parts = (
            _range(self.flops.values(), 1e12, "TFLOP/s in fp16"),
            _range(self.links.values(), 1e9, "GB/s to the next"),
        )
        return ", ".join(filter(None, parts))


def try_gpus(gpus: Gpus) -> Trial:
    """Try all GPUs of this process and return what they did."""
    trial, count = Trial(), len(gpus.names)

    def attempt(who: str, work: Callable[[], float]) -> float | None:
        try:
            return work()
        except RuntimeError as e:  # of CUDA's errors the first line says it
            trial.problems.append(f"{who}: {(str(e).strip() or repr(e)).splitlines()[0]}")
            return None

    for i in range(count):
        if (flops := attempt(f"GPU {i}", partial(_tried, gpus, i, trial))) is not None:
            trial.flops[i] = flops
    ring = [(i, (i + 1) % count) for i in range(count if count > 2 else count - 1)]
    for i, j in ring:
        if {i, j} <= trial.flops.keys():
            rate = attempt(f"GPUs {i} and {j}", partial(gpus.copy, i, j))
            trial.links |= {} if rate is None else {(i, j): rate}
    products = {f"GPU {i}: multiplies matrices": flops / 1e12 for i, flops in trial.flops.items()}
    copies = {f"GPUs {i} and {j}: copy": rate / 1e9 for (i, j), rate in trial.links.items()}
    for speeds, unit, slow in ((products, "TFLOP/s", _SLOW), (copies, "GB/s", _SLOW_LINK)):
        middle = median_high(speeds.values()) if speeds else 0.0
        trial.problems += [
            f"{work} at {speed:,.3g} {unit}, where the median is {middle:,.3g}"
            for work, speed in speeds.items()
            if speed * slow < middle
        ]
    return trial


def _tried(gpus: Gpus, i: int, trial: Trial) -> float:
    free, total = gpus.memory(i)
    if free < _FREE * total - _GIB:
        sizes = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB of memory are free"
        trial.problems.append(f"GPU {i}: {sizes}, so another process uses it")
    return gpus.multiply(i)


def _range(values: Any, unit: float, name: str) -> str:
    numbers = [f"{value / unit:,.0f}" for value in sorted(values)]
    return f"{'-'.join(dict.fromkeys([numbers[0], numbers[-1]]))} {name}" if numbers else ""


class TorchGpus:
    """The GPUs that torch sees: of NVIDIA, or of AMD in a build for ROCm."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        count = torch.cuda.device_count()
        self.names = [torch.cuda.get_device_name(i) for i in range(count)]

    def memory(self, i: int) -> tuple[int, int]:
        return self.torch.cuda.mem_get_info(i)

    def multiply(self, i: int) -> float:
        ones = self.torch.ones(_SIZE, _SIZE, dtype=self.torch.float16, device=i)
        product = ones @ ones
        if not bool((product == _SIZE).all()):
            raise RuntimeError("a product of matrices is wrong")
        return 2 * _SIZE**3 / self._seconds(lambda: self.torch.mm(ones, ones, out=product), i)

    def copy(self, i: int, j: int) -> float:
        source = self.torch.arange(_BYTES // 4, dtype=self.torch.int32, device=i)
        target = self.torch.empty_like(source, device=j)
        seconds = self._seconds(lambda: target.copy_(source), i, j)
        if not bool((target == self.torch.arange(_BYTES // 4, device=j)).all()):
            raise RuntimeError("a copy between them arrives changed")
        return _BYTES / seconds

    def _seconds(self, work: Callable[[], object], *devices: int) -> float:
        best = float("inf")
        for _ in range(_REPEATS + 1):  # the first connects the devices and loads kernels
            began = time.perf_counter()
            work()
            for device in devices:
                self.torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
        return best
