"""What general compressors need for the held-out text: the yardsticks beside bits per byte.

All three are honest in different ways. `xz` knows nothing but the held-out text itself, as one
stream; `zlib_per_file` not even the neighbouring files; `xz_conditional` has seen a sample of the
training text, as a model has: xz(sample + held-out) - xz(sample).
"""

import lzma
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SAMPLE_FILES = 400
# -9e is not always the smaller one; both have a window (64 MiB) that holds sample and held-out.
PRESETS = {"9": 9, "9e": 9 | lzma.PRESET_EXTREME}


def _xz(data: bytes, preset: int) -> int:
    return len(lzma.compress(data, preset=preset))  # releases the GIL, so threads are enough


def compress(held_out: list[bytes], sample: list[bytes]) -> dict[str, Any]:
    """Bits per byte of held-out documents, in corpus order; the smaller xz preset is the one used.

    `sample`: training documents for the conditional size. Under a second for each MB of both.
    """
    text, before = b"".join(held_out), b"".join(sample)
    with ThreadPoolExecutor(2) as pool:
        sizes = dict(zip(PRESETS, pool.map(lambda p: _xz(text, p), PRESETS.values()), strict=True))
        best = min(sizes, key=lambda name: (sizes[name], name))
        both, alone = pool.map(lambda data: _xz(data, PRESETS[best]), (before + text, before))

    def row(size: int, **more: Any) -> dict[str, Any]:
        return {"bytes": size, "bits_per_byte": 8 * size / len(text), **more}

    return {
        "held_out_bytes": len(text),
        "held_out_files": len(held_out),
        "xz": row(sizes[best], preset=best),
        "zlib_per_file": row(sum(len(zlib.compress(d, 9)) for d in held_out), level=9),
        "xz_conditional": row(
            both - alone, preset=best, sample_files=len(sample), sample_bytes=len(before)
        ),
    }


_NAMES = {
    "xz": "xz, the files as one stream",
    "zlib_per_file": "zlib, file by file",
    "xz_conditional": "conditional xz, given training files",
}


def bits_per_byte(manifest: dict[str, Any]) -> dict[str, float]:
    """What each compressor needs for the held-out text of a dataset, under a name for people; empty
    where none was tried."""
    stored = manifest.get("baselines") or {}
    return {name: stored[k]["bits_per_byte"] for k, name in _NAMES.items() if k in stored}
