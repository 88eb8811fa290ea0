"""Corpora of token ids on disk, as written by Megatron, numpy and webdataset."""

import struct
from pathlib import Path

import numpy as np
import webdataset

from tests.trainer.data.small_dataset import END

SIZES = {"validation_fraction": 0.1, "shard_tokens": 4000, "member_tokens": 1500}
CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}  # Megatron's codes


def corpus(seed=0, tokens=20_000) -> list[np.ndarray]:
    """Return documents of bytes, each with its end-of-text token."""
    rng, documents = np.random.default_rng(seed), []
    while tokens > 0:
        length = int(rng.integers(1, 400))
        documents.append(np.append(rng.integers(0, 256, length - 1), END))
        tokens -= length
    return documents


def write_megatron(path: Path, documents: list[np.ndarray], dtype="uint16", sequences=2) -> Path:
    """Write like Megatron's builder; every document has up to `sequences` sequences."""
    parts = [np.array_split(d, min(sequences, len(d))) for d in documents]
    sizes = [len(s) for d in parts for s in d]
    pointers = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    firsts = np.cumsum([0, *map(len, parts)])
    np.concatenate(documents).astype(dtype).tofile(path.with_suffix(".bin"))
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(sizes), len(firsts))
    arrays = [np.array(sizes, "<i4"), pointers.astype("<i8"), firsts.astype("<i8")]
    path.with_suffix(".idx").write_bytes(head + b"".join(a.tobytes() for a in arrays))
    return path.with_suffix(".bin")


def write_tar(path: Path, windows: np.ndarray, suffix="npy") -> Path:
    """Write a webdataset of arrays with webdataset's own writer."""
    with webdataset.TarWriter(str(path)) as tar:
        for i, window in enumerate(windows):
            raw = window.tobytes() if suffix != "npy" else window
            tar.write({"__key__": f"{i:06d}", suffix: raw, "json": {"i": i}})
    return path


def placed(split) -> list[np.ndarray]:
    """Return the tokens of a split, read with numpy's memmap from the positions in the index."""
    parts_of_split = []
    for number in range(len(split.shard_tokens)):
        shard = split.shard(number)
        data = np.memmap(shard.where, np.uint8, "r")
        extents = [data[m.tok["offset"] :][: m.tok["size"]] for m in shard.members]
        parts_of_split.append(np.concatenate(extents).view(shard.dtype))
    return parts_of_split


FLAT = np.concatenate(corpus())


def write(kind: str, folder: Path) -> tuple[Path, dict]:
    """Write a corpus that holds FLAT (or the first part of it, in windows); return its path and the
    arguments for indexing."""
    folder.mkdir(exist_ok=True)
    windows = FLAT[: len(FLAT) // 256 * 256].reshape(-1, 256)
    if kind in CODES:
        documents = np.split(FLAT, np.flatnonzero(FLAT == END) + 1)[:-1]
        documents = [d % 200 for d in documents] if kind == "uint8" else documents
        return write_megatron(folder / "text_document", documents, kind), {}
    if kind == "flat":
        FLAT.astype("<u2").tofile(folder / "tokens.bin")
        return folder / "tokens.bin", {"dtype": "uint16"}
    if kind == "tar":
        return write_tar(folder / "00000.tar", windows.astype("<u2")), {}
    if kind == "raw tar":
        return write_tar(folder / "00000.tar", windows.astype("<u2"), "tok"), {"dtype": "uint16"}
    dtype = {"npy": "<u2", "npy big": ">u2", "npy long": "<i8", "npy rows": "<u4"}[kind]
    np.save(folder / "tokens.npy", (windows if kind == "npy rows" else FLAT).astype(dtype))
    return folder / "tokens.npy", {}


KINDS = [*CODES, "flat", "npy", "npy big", "npy long", "npy rows", "tar", "raw tar"]
IN_PLACE = {**dict.fromkeys(CODES, "megatron"), "flat": "flat", "tar": "tar", "raw tar": "tar"}
