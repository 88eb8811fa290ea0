"""Datasets of given tokens, written in milliseconds with the builder's own ShardWriter."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from forescale.data.dataset import FORMAT, MANIFEST, TOKENIZER
from forescale.data.prepare.writer import ShardWriter
from forescale.data.tokenizer import byte_tokenizer
from forescale.ground.storage import write_file, write_json, write_table

END = 256  # the byte tokenizer's end-of-text


def write_dataset(
    path: Path, train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]] = (), member=64
) -> Path:
    """train, held_out: for each shard the lengths of its documents, including end of text.

    Tokens count up over the dataset, modulo 251, so that no two windows are equal by chance.
    """
    path.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    files = {TOKENIZER: write_file(path / TOKENIZER, tokenizer.to_str().encode())}
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
    described = {
        "file": TOKENIZER,
        "sha256": files[TOKENIZER].sha256,
        "vocab_size": 257,
        "end_of_text": END,
    }
    manifest = {"format": FORMAT, "dtype": "uint16", "tokenizer": described, "splits": splits}
    manifest |= {"corpus": {"sha256": "0" * 64, "documents": 0}, "build": {}, "report": {}}
    files[MANIFEST] = write_json(path / MANIFEST, {**manifest, "baselines": None})
    write_table(path, files)
    return path


def flip(path: Path, at: int) -> None:
    """Change a bit of the byte `at` of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
