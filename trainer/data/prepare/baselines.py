"""Compressed sizes of the held-out text, for comparison with a model's bits per byte.

The three compressors have different information. `xz` sees only the held-out text, as one stream;
`zlib_per_file` sees only one file at a time; `xz_conditional` has seen a sample of the training
text, like a model: xz(sample + held-out) - xz(sample).
"""

import lzma
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SAMPLE_FILES = 400
# -9e isn't always smaller; the window of both (64 MiB) covers sample and held-out text.
PRESETS = {"9": 9, "9e": 9 | lzma.PRESET_EXTREME}


def _xz(data: bytes, preset: int) -> int:
    return len(lzma.compress(data, preset=preset))  # releases the GIL, so threads are enough


def compress(held_out: list[bytes], sample: list[bytes]) -> dict[str, Any]:
    """Return sizes and bits per byte of held-out documents, in corpus order; the better xz preset
    is used.

    sample: training documents for the conditional size. Takes less than a second per MB of both.
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
    """Return bits per byte of each compressor for the held-out text of a dataset, by a readable
    name; empty if none was computed."""
    stored = manifest.get("baselines") or {}
    return {name: stored[k]["bits_per_byte"] for k, name in _NAMES.items() if k in stored}
