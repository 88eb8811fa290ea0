"""A dataset of conversations from a file of examples, with a column of the learned tokens.

Invariant: the same file and request give the same dataset, which a cache stores under a name that
both decide; it is either complete or doesn't exist. Each line is an example in it, or reported as a
fault. Examples keep the order of the file: the order of training shuffles them. All of them are in
memory while they are built, at some 5 bytes a token.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forescale.data.conversations.examples import EXAMPLES, PREFERENCES, Example, Reader
from forescale.data.conversations.template import ChatTemplate
from forescale.data.dataset import Dataset
from forescale.data.prepare.selection import SPLITS
from forescale.data.prepare.work import build_once
from forescale.data.prepare.writer import ShardWriter, write_manifest
from forescale.data.text.documents import ReadingReport
from forescale.data.tokenizer import Vocabulary, token_bytes
from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, hash_file, staged

_RECIPE = 1  # increase it whenever the same lines become other tokens
_SHARD_TOKENS, _MEMBER_TOKENS = 1 << 24, 1 << 20
_NAMED = 5  # lines that a message names for each reason


@dataclass(frozen=True)
class Request:
    """Everything that decides a dataset except its file.

    most: tokens of the longest example; held_out: share of the examples, chosen by the hash of
    their text (of preferences: of their prompt), so that equal ones are in one split; unusable:
    fail, or skip lines that can't be used.
    """

    vocabulary: Vocabulary
    template: ChatTemplate
    most: int
    held_out: float
    unusable: str
    are_preferences: bool = False

    def describe(self, path: str) -> dict[str, Any]:
        """Return it with a file, as stored in the manifest."""
        kind = "preferences" if self.are_preferences else "examples"
        digest = hash_file(Path(path)).sha256
        return {
            "source": {"kind": kind, "name": Path(path).name, "sha256": digest},
            "recipe": _RECIPE,
            "tokenizer": hashlib.sha256(self.vocabulary.raw).hexdigest(),
            "end_of_text": self.vocabulary.end,
            "template": self.template.source,
            "tokens": dict(self.template.tokens),
            "most": self.most,
            "held_out": self.held_out,
            "unusable": self.unusable,
        }


def prepare_conversations(
    path: str, cache: Path, request: Request, progress: Progress = silent
) -> Dataset:
    """Return the dataset of a file of JSON lines; the first call builds it in the cache.

    Raises UserError if the file can't be read or holds no example, and for lines that can't be
    used, unless they are skipped.
    """
    if not Path(path).is_file():
        problem = "no such file" if not Path(path).exists() else "is no file"
        raise UserError(path, problem, "give JSON lines: data=FILE.jsonl")
    described = request.describe(path)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    output = cache / f"conversations-{digest[:16]}"
    build_once(output, progress, lambda: _build(path, output, request, described, progress))
    return Dataset(output)


def faults_sentence(report: dict[str, Any]) -> str | None:
    """Return how many lines can't be used, and which, in words; None if all can. report: as in the
    manifest, under report.left_out."""
    if not report:
        return None
    parts = []
    for reason, fault in report.items():
        names, others = fault["first"][:_NAMED], fault["count"] - _NAMED
        lines = "; ".join(names) if any("," in name for name in names) else ", ".join(names)
        lines += f" and {others:,} more" if others > 0 else ""
        parts.append(f"{fault['count']:,} {reason} (line {lines})")
    total = sum(fault["count"] for fault in report.values())
    return f"{total:,} line{'s' * (total != 1)} can't be used: {', '.join(parts)}"


def _build(
    path: str, output: Path, request: Request, described: dict[str, Any], progress: Progress
) -> None:
    vocabulary, template, faults = request.vocabulary, request.template, ReadingReport()
    are_preferences = request.are_preferences
    reader = Reader(vocabulary.load(), template, vocabulary.end, request.most, are_preferences)
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
        forms = PREFERENCES if are_preferences else EXAMPLES
        raise UserError(path, "holds no example", f"write lines {forms}")
    # Held out are, of the distinct examples, the share with the least hashes, at least one of two.
    keys = [hashlib.blake2b(example.text, digest_size=8).digest() for example in examples]
    distinct, share = sorted(set(keys)), request.held_out
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1) if share else 0
    held_out = set(distinct[:count])
    with staged(output) as stage:
        splits, entries, corpus = {}, dict[str, FileEntry](), hashlib.sha256()
        for name, is_held_out in zip(SPLITS, (False, True), strict=True):
            part = [
                e for e, key in zip(examples, keys, strict=True) if (key in held_out) is is_held_out
            ]
            splits[name], files = _write_split(stage, name, part, vocabulary)
            entries |= files
            for row in splits[name]["shards"]:
                corpus.update(row["sha256"].encode())
        lengths = np.bincount([len(example.ids).bit_length() - 1 for example in examples]).tolist()
        report = {"lengths": lengths, "sources": [], "left_out": left_out}
        write_manifest(stage, entries, vocabulary, splits, corpus.hexdigest(), described, report)


def _write_split(
    stage: Path, split: str, examples: Sequence[Example], vocabulary: Vocabulary
) -> tuple[dict[str, Any], dict[str, FileEntry]]:
    """Write shards of about _SHARD_TOKENS; return the manifest's part and the files' entries."""
    rows, entries, end = list[dict[str, Any]](), dict[str, FileEntry](), vocabulary.end
    writer: ShardWriter | None = None
    for number, (ids, learned, _) in enumerate(examples, 1):
        if writer is None:
            name = f"{split}-{len(rows):06d}"
            writer = ShardWriter(stage, name, vocabulary.dtype, _MEMBER_TOKENS, has_learned=True)
            size = 0
        size += len(ids) + 1
        if ids[-1] != end:  # every document of a dataset ends with it
            ids, learned = np.append(ids, end), np.append(learned, False)
        writer.add(ids, learned)
        if size >= _SHARD_TOKENS or number == len(examples):
            row, files = writer.finish()
            rows.append(row)
            entries |= files
            writer = None
    bytes_of = token_bytes(vocabulary.load())
    totals = {
        "tokens": sum(row["tokens"] for row in rows),
        "documents": len(examples),
        "bytes": sum(int(bytes_of[example.ids].sum()) for example in examples),
    }
    return {**totals, "shards": rows}, entries
