"""Build a dataset of conversations from a file of examples, with a column of what is learned.

Invariant: the same file and request give the same dataset, which a cache keeps under a name that
both decide; it is either complete or doesn't exist. Each line is an example in it, or named as a
fault. Examples stand in the order of the file: the order of training shuffles them. All of them are
in memory while they are built, at some 5 bytes a token.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forescale.console import Progress, silent
from forescale.data.conversations.lines import FORMS, Example, Reader
from forescale.data.conversations.preferences import FORMS as PREFERENCES
from forescale.data.conversations.template import ChatTemplate
from forescale.data.dataset import FORMAT, MANIFEST, TOKENIZER, Dataset
from forescale.data.prepare.selection import SPLITS
from forescale.data.prepare.work import build_lock
from forescale.data.prepare.writer import ShardWriter
from forescale.data.text.documents import ReadingReport
from forescale.data.tokenizer import Vocabulary, token_bytes
from forescale.errors import UserError
from forescale.storage import FileEntry, hash_file, staged, write_file, write_json, write_table

_RECIPE = 1  # increase it whenever the same lines become other tokens
_SHARD_TOKENS, _MEMBER_TOKENS = 1 << 24, 1 << 20
_NAMED = 5  # lines that a message names for each reason


@dataclass(frozen=True)
class Request:
    """What decides a dataset beside its file. most: tokens of the longest example; held_out: share
    of the examples, chosen by the hash of their text, so that equal ones are in one split, or of
    their prompt, of preferences; unusable: fail, or skip a line that is no example."""

    vocabulary: Vocabulary
    template: ChatTemplate
    most: int
    held_out: float
    unusable: str
    are_preferences: bool = False

    @property
    def kind(self) -> str:
        """What the manifest calls the examples."""
        return "preferences" if self.are_preferences else "examples"


def prepare_conversations(
    path: str, cache: Path, request: Request, progress: Progress = silent
) -> Dataset:
    """Return the dataset of a file of JSON lines; the first call builds it in the cache.

    Raises UserError if the file can't be read, holds no example, or a line that is none, unless
    those are skipped.
    """
    if not Path(path).is_file():
        problem = "no such file" if not Path(path).exists() else "is no file"
        raise UserError(path, problem, "give JSON lines: data=FILE.jsonl")
    described = _described(path, request)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    output = cache / f"conversations-{digest[:16]}"
    if not output.exists():
        with build_lock(output, progress):
            if not output.exists():
                _build(path, output, request, described, progress)
    return Dataset(output)


def faults_sentence(report: dict[str, Any]) -> str | None:
    """Return how many lines are no examples, and which, in words; None if there are none. report:
    as in the manifest, under report.left_out."""
    if not report:
        return None
    parts = []
    for reason, found in report.items():
        named, more = found["first"][:_NAMED], found["count"] - _NAMED
        names = "; ".join(named) if any("," in name for name in named) else ", ".join(named)
        names += f" and {more:,} more" if more > 0 else ""
        parts.append(f"{found['count']:,} {reason} (line {names})")
    total = sum(found["count"] for found in report.values())
    return f"{total:,} line{'s' * (total != 1)} can't be used: {', '.join(parts)}"


def _described(path: str, request: Request) -> dict[str, Any]:
    file = Path(path)
    return {
        "source": {"kind": request.kind, "name": file.name, "sha256": hash_file(file).sha256},
        "recipe": _RECIPE,
        "tokenizer": hashlib.sha256(request.vocabulary.raw).hexdigest(),
        "end_of_text": request.vocabulary.end,
        "template": request.template.source,
        "tokens": dict(request.template.tokens),
        "most": request.most,
        "held_out": request.held_out,
        "unusable": request.unusable,
    }


def _build(
    path: str, output: Path, request: Request, described: dict[str, Any], progress: Progress
) -> None:
    vocabulary, faults = request.vocabulary, ReadingReport()
    reader = Reader(
        vocabulary.load(),
        request.template,
        vocabulary.end,
        request.most,
        request.are_preferences,
    )
    examples: list[Example] = []
    for example in reader.examples(path, faults):
        examples.append(example._replace(ids=example.ids.astype(vocabulary.dtype)))
        if len(examples) % 1000 == 0:
            progress("read examples", len(examples), None, "examples")
    left_out = faults.as_dict()
    sentence = faults_sentence(left_out)
    if sentence and (request.unusable == "fail" or not examples):
        todo = "correct them, or leave them out with unusable=skip"
        raise UserError(path, sentence, todo if examples else "correct them")
    if not examples:
        forms = PREFERENCES if request.are_preferences else FORMS
        raise UserError(path, "holds no example", f"write lines {forms}")
    parts = dict(zip(SPLITS, _divided(examples, request.held_out), strict=True))
    with staged(output) as stage:
        _write(stage, parts, vocabulary, described, left_out)


def _divided(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on, and those held out: of the distinct ones the share with the
    least hashes, at least one of two."""
    keys = [hashlib.blake2b(example.text, digest_size=8).digest() for example in examples]
    distinct = sorted(set(keys))
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1) if share else 0
    held_out = set(distinct[:count])
    train = [e for e, key in zip(examples, keys, strict=True) if key not in held_out]
    return train, [e for e, key in zip(examples, keys, strict=True) if key in held_out]


def _write(
    stage: Path,
    parts: dict[str, list[Example]],
    vocabulary: Vocabulary,
    described: dict[str, Any],
    left_out: dict[str, Any],
) -> None:
    entries = {TOKENIZER: write_file(stage / TOKENIZER, vocabulary.raw)}
    bytes_of = token_bytes(vocabulary.load())
    splits: dict[str, Any] = {}
    for name, examples in parts.items():
        rows = []
        for number, shard in enumerate(_shards(examples)):
            row, files = _shard(stage, f"{name}-{number:06d}", shard, vocabulary)
            rows.append(row)
            entries |= files
        splits[name] = {
            "tokens": sum(row["tokens"] for row in rows),
            "documents": len(examples),
            "bytes": sum(int(bytes_of[example.ids].sum()) for example in examples),
            "shards": rows,
        }
    lengths = np.bincount([len(e.ids).bit_length() - 1 for part in parts.values() for e in part])
    corpus = "".join(row["sha256"] for split in splits.values() for row in split["shards"])
    manifest = {
        "format": FORMAT,
        "dtype": vocabulary.dtype.name,
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": entries[TOKENIZER].sha256,
            "vocab_size": vocabulary.size,
            "end_of_text": vocabulary.end,
        },
        "splits": splits,
        "corpus": {
            "sha256": hashlib.sha256(corpus.encode()).hexdigest(),
            "documents": sum(split["documents"] for split in splits.values()),
        },
        "build": described,
        "report": {"lengths": lengths.tolist(), "sources": [], "left_out": left_out},
        "baselines": None,
    }
    entries[MANIFEST] = write_json(stage / MANIFEST, manifest)
    write_table(stage, entries)


def _shards(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Yield runs of examples of about _SHARD_TOKENS each."""
    first = size = 0
    for i, example in enumerate(examples, 1):
        size += len(example.ids) + 1
        if size >= _SHARD_TOKENS or i == len(examples):
            yield examples[first:i]
            first, size = i, 0


def _shard(
    stage: Path, name: str, examples: Sequence[Example], vocabulary: Vocabulary
) -> tuple[dict[str, Any], dict[str, FileEntry]]:
    writer = ShardWriter(stage, name, vocabulary.dtype, _MEMBER_TOKENS, has_learned=True)
    for example in examples:
        ids, learned = example.ids, example.learned
        if ids[-1] != vocabulary.end:  # every document of a dataset ends with it
            ids, learned = np.append(ids, vocabulary.end), np.append(learned, False)
        writer.add(ids, learned)
    return writer.finish()
