"""Corpora that are tokenised already, made a dataset where they lie: indexed, not copied.

    inputs -> files (kinds) -> documents dealt to splits, indexes (indexing)

Every token is read once, for its checksum, and to see that it is in the vocabulary. From then on a
changed, moved or shortened file is Damaged, as a tar of ours would be.

Documents end where the corpus says so (the index of Megatron, the rows of an array, the members of
a tar) and, but for Megatron, after every end-of-text token. Nothing is shuffled before training,
which mixes windows of data.shuffle_shards shards at a time.

Invariant: the same files and the same request give the same dataset; the output holds all of it,
or does not exist.
"""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forescale.data.dataset import FORMAT, MANIFEST, TOKENIZER
from forescale.data.prepare.claim import expect_same, held
from forescale.data.prepare.selection import SPLITS
from forescale.data.progress import Meter, Progress, silent
from forescale.data.remote.transfer import is_url
from forescale.data.text.documents import Report
from forescale.data.text.inputs import HUB, input_name, kind_of
from forescale.data.text.opening import reading, shown
from forescale.data.tokenised.indexing import Indexer, dtype_name
from forescale.data.tokenised.kinds import TokenFile, bin_of, describe, kind_of_file
from forescale.data.tokenizer import Vocabulary, given_tokenizer, vocabulary_of
from forescale.errors import UserError
from forescale.storage import staged, write_file, write_json, write_table

_KINDS = ".bin with .idx, .npy, .bin, or .tar of such arrays"


def in_place_kind(path: str) -> str | None:
    """How an input's tokens are stored ("megatron", "npy", "flat", "tar", or several, joined);
    None where it holds text, or is not there.

    Of a folder or a glob with both, what most bytes belong to counts. Raises UserError for a tar
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
    """Make a dataset at `output` of the tokens in `inputs`, or find it there, made from the same.

    tokenizer: the one that the tokens are of, as `given_tokenizer` takes it; end_of_text: its token
    that ends a document; dtype: of raw ids. A shard of the dataset is a part of a file of about
    shard_tokens, its members are runs of at most member_tokens.

    Raises UserError for files that aren't whole, ids outside the vocabulary, inputs of different
    dtypes, and where `output` holds something else.
    """
    output = Path(output)
    raw = given_tokenizer(tokenizer)
    if raw is None:
        what = "a corpus that is tokenised already has its tokenizer"
        raise UserError("tokenizer", what, "give its tokenizer.json")
    vocabulary = vocabulary_of(raw, tokenizer, end_of_text)
    left_out = Report()
    found = [_files(path, left_out) for path in inputs]
    request = {
        "source": _described(found),
        "tokenizer": hashlib.sha256(raw).hexdigest(),
        "end_of_text": vocabulary.end,
        "dtype": dtype,
        "validation": validation_fraction,
        "shard_tokens": shard_tokens,
        "member_tokens": member_tokens,
    }
    if not output.exists():
        with held(output, progress):
            if not output.exists():
                names = [input_name(path) for path in inputs]
                _build(found, names, output, vocabulary, request, left_out, progress)
    expect_same(output, request)
    return output


def _build(
    found: list[list[tuple[str, str]]],
    names: list[str],
    output: Path,
    vocabulary: Vocabulary,
    request: dict[str, Any],
    left_out: Report,
    progress: Progress,
) -> None:
    told = np.dtype(request["dtype"]).newbyteorder("<") if request["dtype"] else None
    corpus = [[describe(where, kind, told, left_out) for where, kind in files] for files in found]
    dtype = _one_dtype([file for files in corpus for file in files], told)
    tokens = sum(file.tokens for files in corpus for file in files)
    with staged(output, tag="index") as stage:
        sizes = [request[key] for key in ("validation", "shard_tokens", "member_tokens")]
        indexer = Indexer(stage, vocabulary, tokens, *sizes)
        meter = Meter(progress, "index the corpus", tokens * dtype.itemsize, "bytes")
        sources = []
        for name, files in zip(names, corpus, strict=True):
            before = _totals(indexer)
            for file in files:
                indexer.add(file, f"{name}: {Path(file.where).name}", meter)
            counts = {key: now - before[key] for key, now in _totals(indexer).items()}
            sources.append({"name": name, **counts, "read_bytes": 0})
        indexer.finish()
        meter.end()
        left_out.merge(indexer.report)
        _publish(stage, indexer, vocabulary, dtype, request, sources, left_out)


def _totals(indexer: Indexer) -> Counter[str]:
    return sum((Counter(split.totals) for split in indexer.splits.values()), Counter[str]())


def _publish(
    stage: Path,
    indexer: Indexer,
    vocabulary: Vocabulary,
    dtype: np.dtype,
    request: dict[str, Any],
    sources: list[dict[str, Any]],
    left_out: Report,
) -> None:
    """Write what speaks of the whole: tokenizer, manifest, the table of files."""
    entries = {TOKENIZER: write_file(stage / TOKENIZER, vocabulary.raw)}
    corpus = hashlib.sha256()
    for name in SPLITS:
        entries |= indexer.splits[name].files
        for row in indexer.splits[name].rows:
            corpus.update(f"{name} {row['content']}\n".encode())
    longest = int(np.flatnonzero(indexer.lengths)[-1])
    manifest = {
        "format": FORMAT,
        "dtype": dtype_name(dtype),
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": entries[TOKENIZER].sha256,
            "vocab_size": vocabulary.size,
            "end_of_text": vocabulary.end,
        },
        "splits": {
            name: {**split.totals, "shards": split.rows} for name, split in indexer.splits.items()
        },
        "corpus": {
            "sha256": corpus.hexdigest(),
            "documents": sum(split.totals["documents"] for split in indexer.splits.values()),
        },
        "build": request,
        "report": {
            "lengths": indexer.lengths[: longest + 1].tolist(),
            "sources": sources,
            "left_out": left_out.as_dict(),
        },
        "baselines": None,
    }
    entries[MANIFEST] = write_json(stage / MANIFEST, manifest)
    write_table(stage, entries)


def _one_dtype(files: list[TokenFile], told: np.dtype | None) -> np.dtype:
    first = files[0]
    for file in files:
        if file.dtype != first.dtype:
            what = f"holds {dtype_name(file.dtype)}, and {shown(first.where)} "
            what += dtype_name(first.dtype)
            raise UserError(shown(file.where), what, "make a dataset of each, and mix them")
    if told is not None and first.dtype != told:
        what = f"is {told.name}, and {shown(first.where)} says {dtype_name(first.dtype)}"
        raise UserError("dtype", what, "leave it out: raw ids alone need it")
    return first.dtype


def _files(path: str, left_out: Report) -> list[tuple[str, str]]:
    """The files of an input in order, each with its kind; an .idx goes with its .bin."""
    found: dict[str, str] = {}
    for where, _ in _listed(path):
        if kind := kind_of_file(where):
            found[bin_of(where)] = kind
        else:
            left_out.add("no token ids", f"{input_name(path)}: {Path(where).name}")
    if not found:
        raise UserError(shown(path), "holds no tokens", f"expected {_KINDS}")
    return list(found.items())


def _listed(path: str) -> Iterator[tuple[str, int]]:
    """Files of a folder, a glob, a path or an address, sorted, with their sizes (0: not known).
    A path as Megatron's tools take it, without .bin and .idx, stands for both."""
    if is_url(path):
        from forescale.data.remote.listing import list_sizes

        yield from ((where, size or 0) for where, size in list_sizes(path))
        return
    path = os.path.abspath(os.path.expanduser(path))
    names = [path]
    if os.path.isdir(path):
        names = glob.glob(f"{glob.escape(path)}/**", recursive=True)
    elif not os.path.exists(path):
        names = glob.glob(path, recursive=True) if re.search(r"[*?\[]", path) else []
        names = names or [f"{path}.bin"] * os.path.isfile(f"{path}.idx")
    with reading(path):
        for name in sorted(names):
            if os.path.isfile(name):
                yield name, os.path.getsize(name)


def _described(found: list[list[tuple[str, str]]]) -> dict[str, Any]:
    """What tells these files from others: the dataset holds their paths, so these count."""
    rows = [(where, kind, _size(where)) for files in found for where, kind in files]
    return {
        "kind": "in place",
        "formats": sorted({kind for _, kind, _ in rows}),
        "files": len(rows),
        "listing": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def _size(where: str) -> int | None:
    if is_url(where):
        return None
    with reading(where):
        return os.path.getsize(where)
