"""Build a dataset of corpora that are already tokenised: they are indexed, not copied.

    inputs -> files (kinds) -> documents assigned to splits, indexes (indexing)

Every token is read once, to compute its checksum and to check that it is in the vocabulary. From
then on a changed, moved or truncated file raises Damaged, like a damaged tar.

Documents end where the corpus says so (the index of Megatron, the rows of an array, the members of
a tar) and, except for Megatron, after every end-of-text token. Nothing is shuffled before training,
which mixes the windows of data.shuffle_shards shards at a time.

Invariant: the same files and the same request give the same dataset; the output is either complete
or doesn't exist.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from forescale.data.prepare.work import build_once
from forescale.data.prepare.writer import write_manifest
from forescale.data.text.documents import ReadingReport
from forescale.data.text.files import input_name, matching
from forescale.data.text.opening import HUB, Total, kind_of, printable, reading
from forescale.data.tokenised.indexing import Indexer, dtype_name
from forescale.data.tokenised.kinds import bin_of, describe, kind_of_file
from forescale.data.tokenizer import Vocabulary, given_tokenizer, vocabulary_of
from forescale.ground.console import Meter, Progress, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, staged
from forescale.remote.transfer import is_url

_KINDS = ".bin with .idx, .npy, .bin, or .tar of such arrays"


def in_place_kind(path: str) -> str | None:
    """Return how an input's tokens are stored ("megatron", "npy", "flat", "tar", or several, joined
    by +); None if it holds text or doesn't exist.

    For a folder or a glob with both, the kind with more bytes counts. Raises UserError for a tar
    that can't be opened.
    """
    if path.startswith(HUB) or not path.strip():
        return None
    sizes, kinds = Counter[bool](), set()
    for where, size in _listed(path):
        if kind := kind_of_file(where):
            kinds.add(kind)
            sizes[True] += size
        elif kind_of(where):
            sizes[False] += size
    return "+".join(sorted(kinds)) if kinds and sizes[True] >= sizes[False] else None


def index_corpus(
    inputs: Sequence[str],
    output: str | Path,
    tokenizer: str,
    *,
    end_of_text: str | None = None,
    dtype: str | None = None,
    validation_fraction: float = 0.01,
    shard_tokens: int = 1 << 24,
    member_tokens: int = 1 << 20,
    progress: Progress = silent,
) -> Path:
    """Build a dataset at `output` of the tokens in `inputs`, or find one there that was built from
    the same request.

    tokenizer: of the tokens, as accepted by `given_tokenizer`; end_of_text: its token that ends a
    document; dtype: of raw ids. A shard of the dataset is a part of a file of about shard_tokens;
    its members are runs of at most member_tokens.

    Raises UserError for incomplete files, ids outside the vocabulary, inputs of different dtypes,
    and if `output` holds something else.
    """
    output = Path(output)
    raw = given_tokenizer(tokenizer)
    if raw is None:
        problem = "can't be trained for a corpus that is tokenised already"
        raise UserError("tokenizer", problem, "give the corpus's tokenizer.json")
    vocabulary = vocabulary_of(raw, tokenizer, end_of_text)
    left_out = ReadingReport()
    files = [(input_name(path), _kinds_of(path, left_out)) for path in inputs]
    rows: list[tuple[str, str, int | None]] = []
    for where, kind in chain.from_iterable(kinds.items() for _, kinds in files):
        with reading(where):
            rows.append((where, kind, None if is_url(where) else os.path.getsize(where)))
    request = {
        # What distinguishes the files from others, with their paths: the dataset refers to them.
        "source": {
            "kind": "in place",
            "formats": sorted({kind for _, kind, _ in rows}),
            "files": len(rows),
            "listing": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        },
        "tokenizer": hashlib.sha256(raw).hexdigest(),
        "end_of_text": vocabulary.end,
        "dtype": dtype,
        "validation": validation_fraction,
        "shard_tokens": shard_tokens,
        "member_tokens": member_tokens,
    }
    build = partial(_build, files, output, vocabulary, request, left_out, progress)
    build_once(output, request, progress, build)
    return output


def _kinds_of(path: str, left_out: ReadingReport) -> dict[str, str]:
    """Return the kinds of an input's files, in their order. Raises UserError if none has tokens."""
    kinds: dict[str, str] = {}
    for where, _ in _listed(path):
        if kind := kind_of_file(where):
            kinds[bin_of(where)] = kind
        else:
            left_out.add("no token ids", f"{input_name(path)}: {Path(where).name}")
    if not kinds:
        raise UserError(printable(path), "holds no tokens", f"expected {_KINDS}")
    return kinds


def _build(
    inputs: list[tuple[str, dict[str, str]]],
    output: Path,
    vocabulary: Vocabulary,
    request: dict[str, Any],
    left_out: ReadingReport,
    progress: Progress,
) -> None:
    raw = np.dtype(request["dtype"]).newbyteorder("<") if request["dtype"] else None
    described = [
        (name, [describe(where, kind, raw, left_out) for where, kind in kinds.items()])
        for name, kinds in inputs
    ]
    first, *others = chain.from_iterable(files for _, files in described)
    dtype, tokens = first.dtype, first.tokens + sum(file.tokens for file in others)
    name_of_first = f"{printable(first.where)} holds {dtype_name(dtype)}"
    if different := next((file for file in others if file.dtype != dtype), None):
        problem = f"holds {dtype_name(different.dtype)}, but {name_of_first}"
        todo = "build a dataset from each, and mix them with data.sources"
        raise UserError(printable(different.where), problem, todo)
    if raw is not None and dtype != raw:
        problem = f"is {raw.name}, but {name_of_first}"
        raise UserError("dtype", problem, "remove it: only raw ids need it")
    with staged(output, tag="index") as stage:
        sizes = [request[key] for key in ("validation", "shard_tokens", "member_tokens")]
        indexer = Indexer(stage, vocabulary, tokens, *sizes)
        meter = Meter(progress, "index the corpus", tokens * dtype.itemsize, "bytes")
        sources = []
        for name, files in described:
            before = indexer.totals()
            for file in files:
                indexer.add(file, f"{name}: {Path(file.where).name}", meter)
            counts = {key: now - before[key] for key, now in indexer.totals().items()}
            sources.append({"name": name, **counts, "read_bytes": 0})
        indexer.finish()
        meter.end()
        left_out.merge(indexer.report)
        entries, splits, corpus = dict[str, FileEntry](), dict[str, Any](), hashlib.sha256()
        for split, part in indexer.splits.items():
            entries |= part.files
            splits[split] = {**part.totals, "shards": part.rows}
            for row in part.rows:
                corpus.update(f"{split} {row['content']}\n".encode())
        lengths = indexer.lengths[: int(np.flatnonzero(indexer.lengths)[-1]) + 1].tolist()
        report = {"lengths": lengths, "sources": sources, "left_out": left_out.as_dict()}
        digest, stored = corpus.hexdigest(), dtype_name(dtype)
        write_manifest(stage, entries, vocabulary, splits, digest, request, report, dtype=stored)


def _listed(path: str) -> Iterator[tuple[str, int]]:
    """Yield the files of a folder, a glob, a path or an address, sorted, with their sizes (0:
    unknown).

    A path without .bin and .idx, as accepted by Megatron's tools, stands for both files.
    """
    if is_url(path):
        from forescale.remote.listing import list_files

        yield from ((where, size or 0) for where, size in list_files(path))
        return
    path = os.path.abspath(os.path.expanduser(path))
    names = [path]
    if os.path.isdir(path):
        # Not by a glob, which follows links of folders: two to the folder itself never end.
        walked = os.walk(path)
        names = [os.path.join(folder, file) for folder, _, files in walked for file in files]
    elif not os.path.exists(path):
        names = matching(path) if re.search(r"[*?\[]", path) else []
        names = names or [f"{path}.bin"] * os.path.isfile(f"{path}.idx")
    with reading(path):
        for name in sorted(names):
            if os.path.isfile(name):
                Total(name).add(size := os.path.getsize(name))  # a hole is as endless as a device
                yield name, size
