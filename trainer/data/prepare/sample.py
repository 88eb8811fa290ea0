"""Samples of the text: for training a BPE, and for the comparison with compressors.

A model's bits per byte are compared with the compressed sizes of the held-out text. `xz` and `ppmd`
see only that text, as one stream; `zlib_per_file` sees only one file at a time; `ppmd_all` has read
the training text before, like a model: what one stream of PPMd grows by, when the held-out text
follows the training text. PPMd predicts each byte from counts of what followed the last 16 and
fewer bytes, so it is the one that learns as a model does.

Invariant: a sample is chosen by the documents' keys and has source order; at most the bytes that
the selection allows plus one document, of which at most `limit` bytes are taken.
"""

import lzma
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from forescale.data.dataset import Dataset
from forescale.data.prepare.columns import UnitFile, UnitWriter, finished
from forescale.data.prepare.pool import Tick
from forescale.data.prepare.selection import COMPARED, HashRun, Selection
from forescale.data.text.documents import ReadingReport, Unit, cut
from forescale.ground.errors import UserError
from forescale.ground.storage import make_folder, read_json, write_json

TOKENIZER, PRECEDING, HELD_OUT = 1, 2, 4  # purposes of a text: bits of a flag
# -9e isn't always smaller; the window of both (64 MiB) covers sample and held-out text.
PRESETS = {"9": 9, "9e": 9 | lzma.PRESET_EXTREME}
_NAMES = {
    "xz": "xz",
    "zlib_per_file": "zlib, file by file",
    "ppmd": "PPMd",
    "ppmd_all": "PPMd, given {megabytes:.3g} MB of training text",
}
_ORDER, _MEMORY = 16, 1 << 30  # bytes before a byte; at most, and taken as the counts grow


def sample_unit(
    selection: Selection, directory: Path, limit: int, number: int, unit: Unit, tick: Tick
) -> None:
    """Collect a unit's texts that the selection wants. A unit without any isn't read. limit: the
    most bytes of one document in the tokenizer's sample."""
    path, bounds = directory / f"{number:06d}", selection.bounds
    held_out, tail = bounds.held_out[unit.source], bounds.tails[unit.source]
    start = 0 if bounds.compared else held_out
    end = max(bounds.tokenizer, bounds.compared, held_out)
    with UnitFile(selection.hashes / f"{number:06d}") as file:
        is_sampled = (tail and bounds.compared) or any(
            file.search(run.offset, run.distinct, start)
            < file.search(run.offset, run.distinct, end)
            for run in map(HashRun._make, file.facts["runs"])
        )
    if not finished(path):
        with UnitWriter(path) as out:
            sizes, flags = [], []
            parts = selection.parts(number, unit, ReadingReport()) if is_sampled else ()
            for part in parts:
                flag = TOKENIZER * (part.key < bounds.tokenizer)
                flag += PRECEDING * (part.key < bounds.compared)
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
        with UnitFile(directory / f"{number:06d}") as file:
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
    with UnitWriter(path) as out:
        # Nothing is held out of a single document that is too short to be cut.
        out.finish(compress(held_out, texts(directory, units, PRECEDING)) if held_out else {})


def compress(held_out: list[bytes], before: Iterable[bytes]) -> dict[str, Any]:
    """Return sizes and bits per byte of held-out documents, in corpus order; the better xz preset
    is used.

    before: training documents, which PPMd reads first. Takes less than a second per MB of both, and
    up to 1.2 GB for 64 MB.
    """
    text = b"".join(held_out)

    def xz(preset: str) -> int:
        return len(lzma.compress(text, preset=PRESETS[preset]))

    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        sizes = dict(zip(PRESETS, pool.map(xz, PRESETS), strict=True))
    best = min(sizes, key=lambda name: (sizes[name], name))
    primed_size, read = ppmd(text, before)

    def row(size: int, **facts: Any) -> dict[str, Any]:
        return {"bytes": size, "bits_per_byte": 8 * size / len(text), **facts}

    return {
        "held_out_bytes": len(text),
        "held_out_files": len(held_out),
        "xz": row(sizes[best], preset=best),
        "zlib_per_file": row(sum(len(zlib.compress(d, 9)) for d in held_out), level=9),
        "ppmd": row(ppmd(text)[0], order=_ORDER),
        "ppmd_all": row(primed_size, order=_ORDER, sample_bytes=read),
    }


def ppmd(text: bytes, before: Iterable[bytes] = ()) -> tuple[int, int]:
    """Return the bytes that PPMd needs for a text, once it has read those before it, and how many
    those are. Its coder holds back a few bytes of the text before, which count here."""
    from pyppmd import Ppmd7Encoder  # takes time, and verbs that only show its results need it not

    encoder, read = Ppmd7Encoder(_ORDER, _MEMORY), 0
    for part in before:
        encoder.encode(part)
        read += len(part)
    return len(encoder.encode(text)) + len(encoder.flush()), read


def primed(dataset: Dataset, size: int, cache: Path) -> tuple[str, float] | None:
    """Return PPMd's bits per byte of the held-out text of a dataset, given `size` bytes of its
    training text or a little more, with a readable name; None if it was built without compressors,
    if PPMd was given so much there already, or for over COMPARED bytes: a long run ends at once.

    The training text is the first in the order of the shards, which takes some four seconds once;
    `cache` is a directory that holds the result for later runs. Raises UserError if that text is
    damaged.
    """
    stored = (dataset.manifest.get("baselines") or {}).get("ppmd_all")
    if stored is None or size >= stored["sample_bytes"] or size > COMPARED:
        return None
    path = cache / f"ppmd-{dataset.identity[:16]}-{size}.json"
    try:
        row = read_json(path)
    except UserError:  # missing, or damaged
        held_out = b"".join(documents(dataset, "validation"))
        needed, read = ppmd(held_out, first_bytes(documents(dataset, "train"), size))
        row = {"bits_per_byte": 8 * needed / len(held_out), "sample_bytes": read}
        with suppress(UserError, OSError):  # a cache that takes no files costs the next run seconds
            make_folder(cache)
            write_json(path, row)
    return _name("ppmd_all", row), row["bits_per_byte"]


def first_bytes(texts: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the first texts that together have `size` bytes, the last of them whole."""
    for text in texts:
        if size <= 0:
            return
        yield text
        size -= len(text)


def documents(dataset: Dataset, split: str) -> Iterator[bytes]:
    """Yield the documents of a split as text, in the order of its shards."""
    part, decode = dataset.split(split), dataset.tokenizer.decode
    for shard, tokens in enumerate(part.shard_tokens):
        start = 0
        for end in part.document_ends(shard, 0, tokens).tolist():
            ids = part.read(shard, start, end - start - 1)  # without the end of text
            yield decode(ids.tolist(), skip_special_tokens=False).encode()
            start = end


def _name(key: str, row: dict[str, Any]) -> str:
    return _NAMES[key].format(megabytes=row.get("sample_bytes", 0) / 1e6)


def bits_per_byte(manifest: dict[str, Any]) -> dict[str, float]:
    """Return bits per byte of each compressor for the held-out text of a dataset, by a readable
    name; empty if none was computed."""
    stored = manifest.get("baselines") or {}
    return {_name(k, stored[k]): stored[k]["bits_per_byte"] for k in _NAMES if k in stored}
