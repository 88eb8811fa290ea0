"""The number formats that this machine multiplies fast, and whether its results repeat to the bit.

Invariant: reads a few small files and imports no torch, because commands that don't train need it.
"""

import ctypes
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from forescale.ground.errors import UserError

# x86: oneDNN, which torch multiplies matrices with, has bf16 from AVX-512 on. ARM: by its own flag.
# Without them torch multiplies element by element, 100 times slower than in fp32 (AVX2 alone).
_FLAGS = {"avx512bw", "amx_bf16", "bf16"}
_FP16_FLAGS = {"avx512_fp16", "avx_ne_convert", "asimdhp"}  # oneDNN's; the last of ARM


@cache
def has_gpu(root: Path = Path("/")) -> bool:
    """Return whether this machine has a GPU that ranks may use. root: replaced in tests."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")
    has_nvidia = visible and any((root / "dev").glob("nvidia[0-9]*"))
    return has_nvidia or (root / "dev/kfd").exists()


@cache
def native_precision(root: Path = Path("/")) -> Literal["bf16", "fp32"]:
    """Return the number format that matrices are multiplied fast in: bf16 on a GPU that ranks may
    use, and on a CPU with instructions for it; else fp32. root: replaced in tests."""
    return "bf16" if has_gpu(root) or _cpu_flags(root) & _FLAGS else "fp32"


def _cpu_flags(root: Path) -> set[str]:
    """Return the names of what the CPU can do; empty if that is not known."""
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return set()
    return {w for line in lines if line.lower().startswith(("flags", "fea")) for w in line.split()}


def check_fp16(kind: str, on_gpu: bool, root: Path = Path("/")) -> None:
    """Raise UserError if this machine's CPU is to train in precision.kind=`kind`, and can't."""
    if kind == "fp16" and not on_gpu and not _cpu_flags(root) & _FP16_FLAGS:
        raise UserError("precision=fp16", "this CPU has no instructions for it", "leave it out")


_FP8 = (8, 9)  # Ada; Hopper is 9.0
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_... of the CUDA driver API


def _devices(driver: Any) -> Iterator[tuple[Any, ctypes.c_int]]:
    """Yield the CUDA driver and each of the GPUs that ranks may use. It is asked because a CUDA
    context would take memory of the GPU. driver: replaced in tests."""
    try:
        driver = driver or ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return
    for i in range(count.value):
        device = ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), i)
        yield driver, device


def capability(driver: Any = None) -> tuple[int, int] | None:
    """Return the lowest CUDA compute capability of the GPUs that ranks may use, as (8, 9); None if
    there is none."""
    capabilities = []
    for cuda, device in _devices(driver):
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        capabilities.append((major.value, minor.value))
    return min(capabilities, default=None)


def gpu_memory(driver: Any = None) -> int | None:
    """Return the bytes of memory of the smallest GPU that ranks may use; None if there is none."""
    sizes = []
    for cuda, device in _devices(driver):
        size = ctypes.c_size_t()
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        sizes.append(size.value)
    return min(sizes, default=None)


def check_fp8(recipe: str) -> None:
    """Raise UserError if this machine can't train with precision.fp8=`recipe`."""
    if recipe == "none":
        return
    where, least = f"precision.fp8={recipe}", ".".join(map(str, _FP8))
    lowest = capability()
    if lowest is None or lowest < _FP8:
        has = "no NVIDIA GPU" if lowest is None else f"a GPU of {lowest[0]}.{lowest[1]}"
        problem = f"needs GPUs of CUDA capability {least} or more, and this machine has {has}"
        raise UserError(where, problem, "leave it out")
    if find_spec("torchao") is None:
        raise UserError(where, "torchao is not installed", 'pip install "forescale[fp8]"')


class Exactness(NamedTuple):
    """Whether a step that is computed again has the same bits, and a sentence that says so."""

    holds: bool
    sentence: str


def exactness(deterministic: bool, on_gpu: bool, invariant: bool = False) -> Exactness:
    """Return what `train.deterministic` and `train.invariant` promise on a device;
    engine/determinism.py and engine/invariant.py keep it."""
    ranks = " on any number of ranks" if invariant else ""
    promise = f"a resumed run repeats the unbroken one bit for bit{ranks}"
    if not on_gpu:
        too = "" if deterministic else ", with train.deterministic=false too"
        return Exactness(True, f"Exact: on a CPU {promise}{too}.")
    if deterministic:
        return Exactness(
            True,
            f"Exact: {promise}, by kernels that always add in one order (train.deterministic=true; "
            "not yet proven on a GPU).",
        )
    return Exactness(
        False,
        "Fast: kernels add in any order, so a resumed run equals the unbroken one up to rounding "
        "only (train.deterministic=false).",
    )
