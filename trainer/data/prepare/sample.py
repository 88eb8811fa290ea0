"""Samples of the text: for training a BPE, and for the comparison with compressors.

A model's bits per byte are compared with the compressed sizes of the held-out text. `xz` sees only
that text, as one stream; `zlib_per_file` sees only one file at a time; `xz_conditional` has seen a
sample of the training text, like a model: xz(sample + held-out) - xz(sample).

Invariant: a sample is chosen by the documents' keys and has source order; at most the bytes that
the selection allows plus one document, of which at most `limit` bytes are taken.
"""

import lzma
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from forescale.data.prepare.columns import UnitFile, UnitWriter, finished
from forescale.data.prepare.pool import Tick
from forescale.data.prepare.selection import HashRun, Selection
from forescale.data.text.documents import ReadingReport, Unit, cut

TOKENIZER, BEFORE, HELD_OUT = 1, 2, 4  # purposes of a text: bits of a flag
# -9e isn't always smaller; the window of both (64 MiB) covers sample and held-out text.
PRESETS = {"9": 9, "9e": 9 | lzma.PRESET_EXTREME}
_NAMES = {
    "xz": "xz, the files as one stream",
    "zlib_per_file": "zlib, file by file",
    "xz_conditional": "conditional xz, given training files",
}


def sample_unit(
    selection: Selection, directory: Path, limit: int, number: int, unit: Unit, tick: Tick
) -> None:
    """Collect a unit's texts that the selection wants. A unit without any isn't read and has no
    file. limit: maximum bytes of one document in the tokenizer's sample."""
    path, bounds = directory / f"{number:06d}", selection.bounds
    start = 0 if bounds.compared else bounds.held_out
    end = max(bounds.tokenizer, bounds.compared)
    with UnitFile(selection.hashes / f"{number:06d}") as file:
        is_sampled = bounds.is_single or any(
            file.search(run.offset, run.distinct, start)
            < file.search(run.offset, run.distinct, end)
            for run in map(HashRun._make, file.facts["runs"])
        )
    if is_sampled and not finished(path):
        with UnitWriter(path) as out:
            sizes, flags = [], []
            for part in selection.parts(number, unit, ReadingReport()):
                flag = TOKENIZER * (part.key < bounds.tokenizer)
                flag += BEFORE * (part.key < bounds.compared)
                if part.split != "train":
                    flag = HELD_OUT if bounds.compared else 0
                if flag:
                    text = part.text
                    if flag == TOKENIZER:
                        text = text[: cut(text, 0, limit)]
                    out.add(text)
                    sizes.append(len(text))
                    flags.append(flag)
            columns = (np.array(sizes, "<u8"), np.array(flags, "<u8"))
            out.finish({"texts": len(sizes), "offsets": [out.add(c) for c in columns]})
    tick(unit.size, 0)


def texts(directory: Path, units: int, flag: int) -> Iterator[bytes]:
    """Yield the collected texts for `flag`, in source order."""
    for number in range(units):
        if not (path := directory / f"{number:06d}").exists():
            continue
        with UnitFile(path) as file:
            count, (sizes, flags) = file.facts["texts"], file.facts["offsets"]
            at = 0
            columns = (file.column(offset, count, "<u8").tolist() for offset in (sizes, flags))
            for size, bits in zip(*columns, strict=True):
                if bits & flag:
                    yield bytes(file.column(at, size, np.uint8))
                at += size


def compress_samples(directory: Path, units: int, path: Path, tick: Tick) -> None:
    """Compress the held-out text; `path` is the file for the sizes."""
    if finished(path):
        return
    held_out = list(texts(directory, units, HELD_OUT))
    before = list(texts(directory, units, BEFORE))
    with UnitWriter(path) as out:
        # Nothing is held out of a single document that is too short to be cut.
        out.finish(compress(held_out, before) if held_out else {})


def compress(held_out: list[bytes], sample: list[bytes]) -> dict[str, Any]:
    """Return sizes and bits per byte of held-out documents, in corpus order; the better xz preset
    is used.

    sample: training documents for the conditional size. Takes less than a second per MB of both.
    """
    text, before = b"".join(held_out), b"".join(sample)

    def xz(data: bytes, preset: str) -> int:
        return len(lzma.compress(data, preset=PRESETS[preset]))

    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        sizes = dict(zip(PRESETS, pool.map(lambda preset: xz(text, preset), PRESETS), strict=True))
        best = min(sizes, key=lambda name: (sizes[name], name))
        both, alone = pool.map(lambda data: xz(data, best), (before + text, before))

    def row(size: int, **facts: Any) -> dict[str, Any]:
        return {"bytes": size, "bits_per_byte": 8 * size / len(text), **facts}

    return {
        "held_out_bytes": len(text),
        "held_out_files": len(held_out),
        "xz": row(sizes[best], preset=best),
        "zlib_per_file": row(sum(len(zlib.compress(d, 9)) for d in held_out), level=9),
        "xz_conditional": row(
            both - alone, preset=best, sample_files=len(sample), sample_bytes=len(before)
        ),
    }


def bits_per_byte(manifest: dict[str, Any]) -> dict[str, float]:
    """Return bits per byte of each compressor for the held-out text of a dataset, by a readable
    name; empty if none was computed."""
    stored = manifest.get("baselines") or {}
    return {name: stored[k]["bits_per_byte"] for k, name in _NAMES.items() if k in stored}
