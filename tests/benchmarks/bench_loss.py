"""Cross-entropy in chunks against torch's own over all logits, forward and backward: time, and the
most memory allocated on the way. Eager, and compiled (as in training) where there is a compiler.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from forescale.engine.compilation import compiler_missing
from forescale.models.config import ModelConfig
from forescale.models.heads.loss import token_losses
from tests.benchmarks.pairing import Result, interleaved
from tests.benchmarks.processes import isolated


@dataclass(frozen=True)
class Sizes:
    """heads: tokens of a micro-batch, vocabulary, width, each. compiled: whether each is measured
    compiled too. seconds: a measurement, at least."""

    heads: tuple[tuple[int, int, int], ...]
    compiled: bool
    seconds: float


# The default job's head, and one of a larger model.
REAL = Sizes(((2048, 4096, 128), (4096, 32768, 256)), compiled=True, seconds=0.2)
TOY = Sizes(((64, 256, 16),), compiled=False, seconds=0.0)


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    ways = (True, False) if sizes.compiled and compiler_missing() is None else (False,)
    results = list[Result]()
    for compiled, head in product(ways, sizes.heads):
        few = rounds if head is sizes.heads[0] else max(1, rounds // 2)  # the larger takes seconds
        config = ModelConfig(depth=1, vocab_size=head[1], max_sequence_length=1)
        chunk = config.targets_at_once(on_gpu=False)
        results += isolated(compare, few, *head, chunk, compiled, sizes.seconds)
    return results


def chunked(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
    return token_losses(hidden_ND, weight_VD, targets_N, chunk)[0].sum()


def full(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), targets_N, reduction="sum")


def compare(
    rounds: int,
    tokens: int,
    vocabulary: int,
    width: int,
    chunk: int,
    compiled: bool,
    seconds: float = 0.2,
) -> list[Result]:
    """Of time and of memory, at one size in bf16."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, width).bfloat16().requires_grad_()
    weight_VD = (torch.randn(vocabulary, width) * width**-0.5).bfloat16().requires_grad_()
    targets_N = torch.randint(vocabulary, (tokens,))

    def once(function: Callable) -> Callable[[], None]:
        function = torch.compile(function) if compiled else function

        def run() -> None:
            hidden_ND.grad = weight_VD.grad = None
            function(hidden_ND, weight_VD, targets_N, chunk).backward()

        return run

    sides = [once(chunked), once(full)]
    way = "compiled" if compiled else "eager"
    where = f"loss, {way}, {tokens:,} tokens, {vocabulary:,} entries, width {width}"
    labels = (f"chunks of {chunk}", "full")
    times = interleaved(rounds, *(lambda run=run: _milliseconds(run, seconds) for run in sides))
    memory = [tuple(allocated(run) / 1e6 for run in sides)]
    return [
        Result(f"{where}, time", "ms", labels, times),
        Result(f"{where}, memory", "MB", labels, memory),
    ]


def _milliseconds(run: Callable[[], None], seconds: float) -> float:
    """The mean over so many seconds or more, so that short calls are measured as well."""
    began, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not calls:
        run()
        calls += 1
    return 1e3 * spent / calls


def allocated(run: Callable[[], None]) -> int:
    """Bytes that `run` has allocated on the CPU at most, beside what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e for e in events if e["name"] == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most
