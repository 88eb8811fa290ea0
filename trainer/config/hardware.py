"""What this machine computes in, as its kernel describes it.

Invariant: reads a few small files, and imports no torch: commands that don't train ask, too.
"""

import os
from functools import cache
from pathlib import Path
from typing import Literal

# x86: oneDNN, which torch multiplies matrices with, has bf16 from AVX-512 on. ARM: by its own flag.
# Without them torch multiplies element by element, 100 times slower than in fp32 (AVX2 alone).
_FLAGS = {"avx512bw", "amx_bf16", "bf16"}


@cache
def native_precision(root: Path = Path("/")) -> Literal["bf16", "fp32"]:
    """Return the number format that matrices are multiplied fast in: bf16 on a GPU that ranks may
    use, and on a CPU with instructions for it; else fp32. root: replaced in tests."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")
    if (visible and any((root / "dev").glob("nvidia[0-9]*"))) or (root / "dev/kfd").exists():
        return "bf16"
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return "fp32"
    words = {
        w for line in lines if line.lower().startswith(("flags", "features")) for w in line.split()
    }
    return "bf16" if words & _FLAGS else "fp32"
