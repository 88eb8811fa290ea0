"""All that can be said against a dataset: its files, its tars against their indexes, its counts.

Invariant: a dataset with no fault reported here reads whole, to the last token and document.
"""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from trainer.data.shards import Dataset, Shard
from trainer.durable import check_table
from trainer.errors import UserError


def check(path: str | Path, tick: Callable[[int], None] = lambda n: None) -> list[str]:
    """One sentence a fault, none if the dataset is whole. `tick` is told of bytes hashed."""
    faults = check_table(Path(path), tick)
    try:
        dataset = Dataset(path)
    except UserError as e:
        return faults or [str(e)]
    for name, split in dataset.manifest["splits"].items():
        for count in ("tokens", "documents"):
            total = sum(row[count] for row in split["shards"])
            if total != split[count]:
                faults.append(
                    f"{path}: the shards of {name} hold {total:,} {count}, "
                    f"the manifest says {split[count]:,}"
                )
        for row in split["shards"]:
            try:
                shard = Shard(Path(path), row, np.dtype(dataset.manifest["dtype"]))
                faults += _layout(shard)
                faults += _contents(shard, row["documents"], dataset)
            except UserError as e:
                faults.append(str(e))
    return list(dict.fromkeys(faults))


def _layout(shard: Shard) -> Iterator[str]:
    """The tar's own headers against the index."""
    want = [
        (f"{m.key}.{kind}.bin", getattr(m, kind)["offset"], getattr(m, kind)["size"])
        for m in shard.members
        for kind in ("doc", "tok")
    ]
    try:
        with tarfile.open(shard.path, "r:") as tar:
            have = [(m.name, m.offset_data, m.size) for m in tar]
    except tarfile.TarError as e:
        yield f"{shard.path}: not a whole tar ({e})"
        return
    for missing in sorted(set(want) - set(have)):
        yield f"{shard.path}: the index has member {missing[0]} at byte {missing[1]:,}, the tar not"
    for extra in sorted(set(have) - set(want)):
        yield f"{shard.path}: the tar has member {extra[0]} at byte {extra[1]:,}, the index not"


def _contents(shard: Shard, documents: int, dataset: Dataset) -> Iterator[str]:
    """Every member's checksum, ids and document ends; the totals against the manifest."""
    first = found = 0
    for m in shard.members:
        where = f"{shard.path}: member {m.key}"
        try:
            tokens = np.frombuffer(shard.payload(m, "tok"), shard.dtype)
            ends = np.frombuffer(shard.payload(m, "doc"), "<u4").astype(np.int64)
        except UserError as e:
            yield str(e)
            continue
        if m.first != first or m.tokens != len(tokens) or m.documents != len(ends):
            yield f"{where} holds other counts than the index says"
        if len(tokens) and int(tokens.max()) >= dataset.vocab_size:
            yield f"{where} holds token ids outside the vocabulary"
        inside = len(ends) == 0 or (ends[0] > 0 and ends[-1] <= len(tokens))
        if not inside or (np.diff(ends) <= 0).any():
            yield f"{where} has document ends out of order"
        elif (tokens[ends - 1] != dataset.end_of_text).any():
            yield f"{where} has a document that doesn't end with the end-of-text token"
        first, found = first + m.tokens, found + len(ends)
    if first != shard.num_tokens or found != documents:
        yield (
            f"{shard.path}: {first:,} tokens and {found:,} documents where the manifest says "
            f"{shard.num_tokens:,} and {documents:,}"
        )
