"""A dataset of conversations, with a column of the learned tokens. What a row may be, and where it
stands: examples.py. Two texts, a prompt and a response, stand as they are; messages become one by a
chat template.

A preference has two responses to one prompt, of which people chose one:

    {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}               the texts as they are
    {"messages": [...], "chosen": MESSAGE, "rejected": MESSAGE}      by a chat template
    {"prompt": [...], "chosen": [...], "rejected": [...]}            the same, as TRL has it
    {"chosen": [...], "rejected": [...]}                             the same, each a whole chat

A MESSAGE is {"role": ..., "content": TEXT}; as a chosen or rejected one, a text is the assistant's.

Invariant: every row is an example, or a fault with its number and its reason. A prompt and its
response are tokenised apart, as when a model writes. The two conversations of a preference differ
in their last response alone, and only that is learned.

The same file and request give the same dataset, which a cache stores under a name that both decide;
it is either complete or doesn't exist. Examples keep the order of the file: the order of training
shuffles them. All of them are in memory while they are built, at some 5 bytes a token.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from forescale.data.conversations.examples import (
    EXAMPLES,
    SIDES,
    canonical,
    checked_messages,
    checked_text,
    digest_of,
    rows_of,
    unit_of,
)
from forescale.data.conversations.template import (
    ChatTemplate,
    Message,
    Piece,
    Unfit,
    encoded_parts,
    joined,
    special_ids,
)
from forescale.data.dataset import Dataset
from forescale.data.prepare.selection import SPLITS
from forescale.data.prepare.work import build_once
from forescale.data.prepare.writer import ShardWriter, write_manifest
from forescale.data.text.documents import ReadingReport
from forescale.data.text.opening import HUB, Total
from forescale.data.tokenizer import Vocabulary, token_bytes
from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, staged

_BATCH = 512  # lines that are tokenised together
_PEEKED = 100  # rows that may show the kind of a file
PREFERENCES = '{"prompt": ..., "chosen": ..., "rejected": ...}'
_RECIPE = 1  # increase it whenever the same lines become other tokens
_SHARD_TOKENS, _MEMBER_TOKENS = 1 << 24, 1 << 20
_NAMED = 5  # lines that a message names for each reason


class Example(NamedTuple):
    """A conversation, or the two of a preference, one after the other. ids: (tokens,); learned:
    (tokens,) bool, True for tokens of responses; text: its hash decides whether the example is held
    out."""

    ids: np.ndarray
    learned: np.ndarray
    text: bytes


class _Line(NamedTuple):
    number: int
    # One, or the chosen and the rejected one. Messages (has_special) become pieces by the template.
    conversations: Sequence[Any]
    has_special: bool  # the texts of special tokens become these tokens
    text: bytes


@dataclass(frozen=True)
class Reader:
    """Reads a file of examples, or of preferences. end: id of the token that ends a text; most:
    tokens of the longest conversation that is allowed; around: ids before and behind the text that
    precedes the last response, of pairs, of which the last is their separator; None: a conversation
    is one text."""

    tokenizer: Tokenizer
    template: ChatTemplate
    end: int
    most: int
    are_preferences: bool = False
    around: tuple[list[int], list[int]] | None = None

    def examples(self, path: str, faults: ReadingReport) -> Iterator[Example]:
        """Yield the examples of a file; add the other lines to `faults` with their numbers."""
        special = special_ids(self.tokenizer)
        for batch in self._batches(self._lines(path, faults), faults):
            encoded: dict[bool, Iterator[list[int]]] = {}
            for has_special in (False, True):
                same = [line for line in batch if line.has_special == has_special]
                texts = [
                    piece.text for line in same for side in line.conversations for piece in side
                ]
                encoded[has_special] = iter(encoded_parts(self.tokenizer, texts, has_special))
            for line in batch:
                ids: list[int] = []
                learned: list[bool] = []
                longest, reason = 0, ""
                for pieces in line.conversations:
                    parts = list(islice(encoded[line.has_special], len(pieces)))
                    tokens, are_learned = joined(pieces, parts, self.end, special)
                    if self.are_preferences or self.around:  # the last response alone
                        before, _ = joined(pieces[:-1], parts[:-1], self.end, special)
                        response = tokens[len(before) :]
                        if self.around:
                            if self.around[1][-1] in before:
                                reason = "whose prompt holds the separator of pairs"
                            before = [*self.around[0], *before, *self.around[1]]
                        tokens = [*before, *response]
                        are_learned = [i >= len(before) for i in range(len(tokens))]
                    ids += tokens
                    learned += are_learned
                    longest = max(longest, len(tokens))
                if reason:
                    faults.add(reason, f"{line.number:,}")
                elif longest > self.most:
                    reason = f"longer than the {self.most:,} tokens of a row"
                    faults.add(reason, f"{line.number:,}, of {longest:,} tokens")
                else:
                    yield Example(np.array(ids), np.array(learned), line.text)

    def _batches(self, lines: Iterator[_Line], faults: ReadingReport) -> Iterator[Sequence[_Line]]:
        """Yield lines some at a time, with pieces in the place of messages."""
        while batch := list(islice(lines, _BATCH)):
            chats = [chat for line in batch if line.has_special for chat in line.conversations]
            all_pieces, ready = iter(self.template.all_pieces(chats)), []
            for line in batch:
                if line.has_special:
                    line = line._replace(
                        conversations=[next(all_pieces) for _ in line.conversations]
                    )
                unfit = [one for one in line.conversations if isinstance(one, Unfit)]
                if unfit:
                    faults.add(str(unfit[0]), f"{line.number:,}")
                else:
                    ready.append(line)
            yield ready

    def _lines(self, path: str, faults: ReadingReport) -> Iterator[_Line]:
        for number, raw in rows_of(path):
            try:
                row = self._row(raw)
                # The prompt of a preference decides, so that no prompt is in both splits.
                *rows, key = two_lines(row) if self.are_preferences else (row, row)
                text = json.dumps(key, sort_keys=True).encode()
                conversations = [self._conversation(row) for row in rows]
                yield _Line(number, conversations, "messages" in rows[0], text)
            except Unfit as e:
                faults.add(str(e), f"{number:,}")

    def _row(self, raw: Any) -> dict[str, Any]:
        if self.are_preferences and not isinstance(raw, Unfit) and not is_preference(raw):
            raise Unfit(f"that are not {PREFERENCES}")
        row = canonical(raw)
        if is_preference(row) != self.are_preferences:
            raise Unfit(f"that are not {EXAMPLES}")
        return row

    def _conversation(self, row: Mapping[str, Any]) -> Sequence[Message] | list[Piece]:
        if "messages" in row:
            return checked_messages(row, self.template.source)
        prompt, response = checked_text(row["prompt"]), checked_text(row["response"])
        if not response.strip():
            raise Unfit("with an empty response")
        return [Piece(prompt, False), Piece(response, True)]


def has_preferences(path: str | Path) -> bool:
    """True if the first row of a file that can be read is a preference. False also for a file that
    can't be read; its reader reports that."""
    try:
        rows = (row for _, row in islice(rows_of(str(path)), _PEEKED))
        return is_preference(next((row for row in rows if not isinstance(row, Unfit)), None))
    except (OSError, UserError):
        return False


def is_preference(row: Any) -> bool:
    """True if a parsed line has two responses."""
    return isinstance(row, dict) and set(SIDES) <= row.keys()


def two_lines(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return chosen and rejected example of a preference, and their prompt. Raises Unfit."""
    equal = Unfit("whose chosen and rejected responses are equal")
    if isinstance(row.get("prompt"), str) and all(isinstance(row[side], str) for side in SIDES):
        prompt = row["prompt"]
        if row["chosen"] == row["rejected"]:
            raise equal
        chosen, rejected = ({"prompt": prompt, "response": row[side]} for side in SIDES)
        return chosen, rejected, prompt
    chats = [_whole_chat(row, side) for side in SIDES]
    *before, last = chats[0]
    *other, rejected_last = chats[1]
    if before != other:
        raise Unfit("whose chosen and rejected chats differ before their last message")
    if not all(isinstance(m, dict) and m.get("role") == "assistant" for m in (last, rejected_last)):
        raise Unfit("whose chosen or rejected message is not the assistant's")
    if last.get("content") == rejected_last.get("content"):
        raise equal
    return {"messages": chats[0]}, {"messages": chats[1]}, before


def _whole_chat(row: Mapping[str, Any], side: str) -> list[Any]:
    chat, before = row[side], row.get("messages", row.get("prompt"))
    if isinstance(chat, str) and isinstance(before, list):
        chat = [{"role": "assistant", "content": chat}]
    chat = [chat] if isinstance(chat, dict) else chat
    if not isinstance(chat, list) or not chat:
        raise Unfit(f"that are not {PREFERENCES}")
    if isinstance(chat[0], dict) and chat[0].get("role") != "assistant":
        return chat  # it holds the prompt, whatever other fields say
    if isinstance(before, str):
        before = [{"role": "user", "content": before}]
    if not isinstance(before, list):
        raise Unfit("without a prompt")
    return [*before, *chat]


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
    around: tuple[list[int], list[int]] | None = None  # see Reader

    def describe(self, path: str) -> dict[str, Any]:
        """Return it with a file, as stored in the manifest."""
        kind = "preferences" if self.are_preferences else "examples"
        digest = digest_of(path)
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
            **({"around": [*self.around]} if self.around else {}),
        }


def prepare_conversations(
    path: str, cache: Path, request: Request, progress: Progress = silent
) -> Dataset:
    """Return the dataset of a file or a data set of the hub; the first call builds it in the cache.

    Raises UserError if the file can't be read or holds no example, and for rows that can't be
    used, unless they are skipped.
    """
    if not path.startswith(HUB):
        if not Path(path).is_file():
            problem = "no such file" if not Path(path).exists() else "is no file"
            raise UserError(path, problem, "give data=FILE.jsonl, FILE.parquet or hf://NAME")
        Total(path).add(Path(path).stat().st_size)  # before the zeros of a hole are hashed
    described = request.describe(path)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    output = cache / f"conversations-{digest[:16]}"
    build = partial(_build, path, output, request, described, progress)
    return build_once(output, described, progress, build)


def faults_sentence(report: dict[str, Any], unit: str = "line") -> str | None:
    """Return how many rows can't be used, and which, in words; None if all can. report: as in the
    manifest, under report.left_out; unit: as unit_of returns it."""
    if not report:
        return None
    parts = []
    for reason, fault in report.items():
        names, others = fault["first"][:_NAMED], fault["count"] - _NAMED
        lines = "; ".join(names) if any("," in name for name in names) else ", ".join(names)
        lines += f" and {others:,} more" if others > 0 else ""
        parts.append(f"{fault['count']:,} {reason} ({unit} {lines})")
    total = sum(fault["count"] for fault in report.values())
    return f"{total:,} {unit}{'s' * (total != 1)} can't be used: {', '.join(parts)}"


def _build(
    path: str, output: Path, request: Request, described: dict[str, Any], progress: Progress
) -> None:
    vocabulary, template, faults = request.vocabulary, request.template, ReadingReport()
    are_preferences = request.are_preferences
    kind = (are_preferences, request.around)
    reader = Reader(vocabulary.load(), template, vocabulary.end, request.most, *kind)
    examples: list[Example] = []
    for example in reader.examples(path, faults):
        examples.append(example._replace(ids=example.ids.astype(vocabulary.dtype)))
        if len(examples) % 1000 == 0:
            progress("read examples", len(examples), None, "examples")
    left_out = faults.as_dict()
    sentence = faults_sentence(left_out, unit_of(path))
    if sentence and (request.unusable == "fail" or not examples):
        todo = "correct them, or leave them out with unusable=skip"
        raise UserError(path, sentence, todo if examples else "correct them")
    if not examples:
        forms = PREFERENCES if are_preferences else EXAMPLES
        raise UserError(path, "holds no example", f"write rows {forms}")
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
