"""An engine from a job: optimizer by recipe, compilation, and what the device can do.

Invariant: whatever a machine lacks (a compiler) is worked around with a notice, never in silence.
"""

import os
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from forescale.config.schema import ConfigError, Problem
from forescale.config.train import TrainJob
from forescale.engine.optim import parameter_groups
from forescale.engine.step import Engine, build_optimizer
from forescale.engine.world import World
from forescale.errors import UserError

# Dense peak FLOP/s in bf16, from the vendors' data sheets; MFU is a fraction of these.
_KNOWN_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
}


class Compilation(NamedTuple):
    """Whether the model is to be compiled, and what to tell the user about it."""

    wanted: bool
    notice: str | None = None


def check_world(job: TrainJob, size: int) -> None:
    """Raises ConfigError where the job doesn't fit the ranks that are really there."""
    problems = job.problems(world_size=size)
    if problems:
        raise ConfigError(Problem(*p) for p in problems)


def build_engine(world: World, model: nn.Module, job: TrainJob) -> Engine:
    """`model` under DeepSpeed, with the parameter groups of the recipe."""
    muon, factors = (_said(model, name) for name in ("muon_parameters", "optimizer_factors"))
    groups = parameter_groups(model.named_parameters(), job.optimizer, muon, factors)
    settings = {
        "betas": (job.optimizer.beta1, job.optimizer.beta2),
        "eps": job.optimizer.eps,
        "momentum": job.optimizer.momentum,
    }
    optimizer = build_optimizer(job.optimizer.kind, [vars(g) for g in groups], **settings)
    return Engine(world, model, optimizer, seed=job.train.seed, clip=job.optimizer.clip)


def _said(model: nn.Module, method: str) -> Any:
    """What an optional method of a model returns; None where it has no such method."""
    own = getattr(model, method, None)
    return own() if own is not None else None


def be_deterministic() -> None:
    """Have torch choose kernels whose results don't depend on the timing of threads.

    Needed even on a CPU: the gradient of an embedding is otherwise compiled to atomic additions,
    and two runs part in the last bits after a few dozen steps.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # For debugging only, and a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compiler_missing() -> str | None:
    """What torch.compile lacks here, or None. For a CPU it writes C++ against Python.h."""
    if torch.cuda.is_available():
        return None
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        return f"a C++ compiler ({compiler})"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.exists() else f"Python's headers ({header})"


def compilation(job: TrainJob) -> Compilation:
    """What `train.compile` means here. Raises UserError for `on` on a machine that can't."""
    missing = compiler_missing()
    if job.train.compile == "off":
        return Compilation(False)
    if missing and job.train.compile == "on":
        what = f"this machine lacks {missing}"
        raise UserError("train.compile=on", what, "install it, or set train.compile=auto")
    if missing:
        notice = f"The model is not compiled, and trains slower: this machine lacks {missing}."
        return Compilation(False, notice)
    # At stage 3 the hooks that gather parameters break the graph apart.
    return Compilation(job.engine.stage < 3 or job.train.compile == "on")


def peak_flops(world: World, configured: float | None, precision: str) -> float:
    """FLOP/s that one device can do in matrix products: configured, known, or measured."""
    if configured:
        return configured
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
        for known, peak in _KNOWN_PEAKS.items():
            if known in name:
                return peak if precision != "fp32" else peak / 2
    return measured_peak(world.device, precision)


def measured_peak(device: torch.device, precision: str) -> float:
    """The best of a few products of two square matrices; a tenth of a second on a CPU."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best
