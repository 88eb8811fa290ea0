"""Check a dataset completely: its files, its tars against their indexes, its counts.

Invariant: if no fault is reported here, the dataset can be read completely, to the last token and
document.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from forescale.data.dataset import Dataset, Shard
from forescale.data.text.opening import open_raw
from forescale.data.tokenised.kinds import tar_members
from forescale.ground.errors import UserError
from forescale.ground.storage import check_table


def check(path: str | Path, tick: Callable[[int], None] = lambda n: None) -> list[str]:
    """Return one sentence per fault, none if the dataset is intact.

    tick: called with the number of bytes hashed since the last call.
    """
    faults = check_table(Path(path), tick)
    try:
        dataset = Dataset(path)
    except UserError as e:
        return faults or [str(e)]
    for name, split in dataset.manifest["splits"].items():
        opened = dataset.split(name)
        for count in ("tokens", "documents"):
            total = sum(row[count] for row in split["shards"])
            if total != split[count]:
                faults.append(
                    f"{path}: the shards of {name} hold {total:,} {count}, "
                    f"the manifest says {split[count]:,}"
                )
        for number, row in enumerate(split["shards"]):
            try:
                shard = opened.shard(number)
                is_tar = bool(row["sha256"])  # not a corpus that is used in place
                if is_tar:
                    with open_raw(shard.where) as f:
                        members = tar_members(f, shard.where, shard.file.size)
                    in_tar = {(m.name, m.offset_data, m.size) for m in members}
                    in_index = {
                        (f"{m.key}.{kind}.bin", place["offset"], place["size"])
                        for m in shard.members
                        for kind in ("doc", "learned", "tok")
                        if (place := getattr(m, kind)) is not None
                    }
                    for name, at, _ in sorted(in_index - in_tar):
                        problem = f"the index has member {name} at byte {at:,}, the tar hasn't"
                        faults.append(f"{shard.where}: {problem}")
                    for name, at, _ in sorted(in_tar - in_index):
                        problem = f"the tar has member {name} at byte {at:,}, the index hasn't"
                        faults.append(f"{shard.where}: {problem}")
                faults += _contents(shard, is_tar, dataset)
            except UserError as e:
                faults.append(str(e))
    if dataset.manifest["report"].get("text"):
        from forescale.data.prepare.parquet import table_faults  # with pyarrow

        faults += table_faults(Path(path), dataset.manifest)
    return list(dict.fromkeys(faults))


def _contents(shard: Shard, is_tar: bool, dataset: Dataset) -> Iterator[str]:
    """Verify every member's checksums, ids and document ends.

    `Shard` has already verified, when it was opened, that members follow each other and that the
    counts match the manifest.
    """
    for at, m in enumerate(shard.members):
        where = f"{shard.where}: member {m.key}"
        tokens = np.empty(m.tokens, shard.dtype.newbyteorder("="))
        try:
            shard.read_into(m.first, tokens)
            ends = shard.ends(at) - m.first
            shard.learned(at)
        except UserError as e:
            yield str(e)
            continue
        if int(tokens.max()) >= dataset.vocab_size:
            yield f"{where} holds token ids outside the vocabulary"
        inside = len(ends) == 0 or (ends[0] > 0 and ends[-1] <= len(tokens))
        if not inside or (np.diff(ends) <= 0).any():
            yield f"{where} has document ends out of order"
        elif is_tar and (tokens[ends - 1] != dataset.end_of_text).any():
            yield f"{where} has a document that doesn't end with the end-of-text token"
