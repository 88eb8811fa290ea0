"""What the benchmark `gpu` measures: the GPU itself, our steps, and those of plain PyTorch on the
same job and the same random windows. Each is a part of the kit (kit.py)."""

import time
from collections import defaultdict
from typing import Any

import torch

from tests.gpu.checks import batch, batch_of, engine_of, job_of, make_step
from tests.gpu.kit import Place

_WARM = 3  # steps before any is measured: moments, graphs, the allocator's segments
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
_KERNELS = 10  # the most expensive of a step that are listed


def device(at: Place, size: int) -> dict[str, Any]:
    """Return names and versions, the FLOP/s of a bf16 product, the bytes/s of a copy of `size`
    bytes, and the seconds of an empty launch."""
    from forescale.engine.build import measured_peak

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": "none"}
    if at.on_gpu:
        facts["gpu"] = torch.cuda.get_device_name(at.device)
        facts["memory_bytes"] = torch.cuda.get_device_properties(at.device).total_memory
    if at.kind == "cuda":
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["gpus"] = torch.cuda.device_count()
    source = torch.ones(size // 4, device=at.device)
    target, small = torch.empty_like(source), torch.ones(1, device=at.device)
    copying = min(_timed(at, lambda: target.copy_(source)) for _ in range(5))
    launching = _timed(at, lambda: [small.add_(1) for _ in range(1000)]) / 1000
    return facts | {
        "matmul_flops": measured_peak(at.device, "bf16"),
        "copy_bytes_per_second": 2 * size / copying,
        "launch_seconds": launching,
    }


def _timed(at: Place, work: Any) -> float:
    at.wait()
    began = time.perf_counter()
    work()
    at.wait()
    return time.perf_counter() - began


def engine_steps(
    at: Place, words: list[str], steps: int, rounds: int, trace: str = ""
) -> dict[str, Any]:
    """Return the seconds of a step, one of each round of `steps`; the bytes of the GPU by phase of
    one step; waits of the host, launches and the most expensive kernels of a profiled one. trace: a
    file for the trace of the latter."""
    engine = engine_of(at, job_of(at, *words))
    windows = [batch_of(at, engine, step) for step in range(4)]

    def make(count: int) -> None:
        for i in range(count):
            make_step(engine, windows[i % len(windows)])
            for _ in engine.world.summaries(behind=1):
                pass

    make(_WARM)
    memory = _bytes_by_phase(at, engine, lambda: make(1))
    seconds = [_timed(at, lambda: make(steps)) / steps for _ in range(rounds)]
    with torch.profiler.profile() as profiler:
        make(2)
        at.wait()
    if trace and at.rank == 0:
        profiler.export_chrome_trace(trace)
    facts = {"seconds": seconds, "tokens": windows[0].targets, "memory_bytes": memory}
    return facts | _of_profile(at, profiler, 2)


def _bytes_by_phase(at: Place, engine: Any, make: Any) -> dict[str, int]:
    """Return the most bytes in each phase of a step, and those that live between steps."""
    if at.kind != "cuda":
        make()
        return {}
    most: dict[str, int] = defaultdict(int)
    phase, plain = "between", engine.mark

    def mark(name: str) -> None:
        nonlocal phase
        most[phase] = max(most[phase], torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        phase = name

    engine.mark = mark
    torch.cuda.reset_peak_memory_stats()
    make()
    mark("between")
    engine.mark = plain
    return {
        "between steps": torch.cuda.memory_allocated(),
        "most in forward and backward": max(most["forward"], most["backward"]),
        "most in the update": most["update"],
    }


def _of_profile(at: Place, profiler: Any, steps: int) -> dict[str, Any]:
    """Return waits, launches and most expensive kernels of a step; on a CPU, its operations."""
    on_gpu = at.kind == "cuda"
    events = profiler.key_averages()

    def seconds(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

    def count(names: tuple[str, ...]) -> float:
        return sum(e.count for e in events if e.key.startswith(names)) / steps

    kernels = [e for e in events if not on_gpu or "CUDA" in str(e.device_type)]
    kernels.sort(key=seconds, reverse=True)
    return {
        "waits": count(_WAITS),
        "launches": count(_LAUNCHES),
        "kernels": [
            {"name": e.key, "times": e.count / steps, "seconds": seconds(e) / steps}
            for e in kernels[:_KERNELS]
        ],
    }


def plain_steps(at: Place, words: list[str], way: str, steps: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of a step of plain PyTorch, see benchmarks/plain.py. way: "masters" is our
    arithmetic, compiled by block as ours; "autocast" that of nanoGPT, compiled as a whole."""
    from forescale.engine.compilation import compile_parts
    from forescale.engine.ranks import ALONE
    from tests.benchmarks.plain import Plain

    job = job_of(at, *words)
    windows = [batch(at, job, ALONE, step) for step in range(4)]
    by_part = job.train.compile != "off" and way == "masters"
    if by_part:  # the loop itself compiles the whole
        job.train.compile = "off"
    loop = Plain(job, way, windows)
    if by_part:
        compile_parts(loop.model)
    loop(_WARM)
    memory = torch.cuda.max_memory_allocated() if at.kind == "cuda" else None
    seconds = [_timed(at, lambda: loop(steps)) / steps for _ in range(rounds)]
    return {"seconds": seconds, "tokens": windows[0].targets, "peak_bytes": memory}
