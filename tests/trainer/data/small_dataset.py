"""Datasets of given tokens, written in milliseconds with the builder's own ShardWriter."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from forescale.data.prepare.writer import ShardWriter, write_manifest
from forescale.data.tokenizer import Vocabulary, byte_tokenizer
from forescale.ground.storage import FileEntry

END = 256  # the byte tokenizer's end-of-text
BYTES = Vocabulary(byte_tokenizer().to_str().encode(), 257, END)


def write_dataset(
    path: Path, train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]] = (), member=64
) -> Path:
    """train, held_out: for each shard the lengths of its documents, including end of text.

    Tokens count up over the dataset, modulo 251, so that no two windows are equal by chance.
    """
    path.mkdir(parents=True)
    files: dict[str, FileEntry] = {}
    splits, at = {}, 0
    for name, shards in (("train", train), ("validation", held_out)):
        rows = []
        for number, lengths in enumerate(shards):
            writer = ShardWriter(path, f"{name}-{number:06d}", np.dtype("uint16"), member)
            for length in lengths:
                writer.add(np.append((np.arange(at, at + length - 1) * 7) % 251, END))
                at += length
            row, entries = writer.finish()
            rows.append(row)
            files |= entries
        totals = {key: sum(row[key] for row in rows) for key in ("tokens", "documents")}
        size = totals["tokens"] - totals["documents"]
        splits[name] = {**totals, "bytes": size, "shards": rows}
    write_manifest(path, files, BYTES, splits, "0" * 64, {}, {})
    return path


def flip(path: Path, at: int) -> None:
    """Change a bit of the byte `at` of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
