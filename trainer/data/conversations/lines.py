"""JSON lines with an example each: read, checked, and made token ids.

    {"prompt": TEXT, "response": TEXT}                           the two texts as they are
    {"messages": [{"role": "user", "content": TEXT}, ...]}       by a chat template (template.py)

Invariant: every line is an example, or a fault that names it and its reason; blank lines are
neither. A prompt's ids and those of its response are made apart, as they are when a model writes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from forescale.data.conversations.ids import encoded_parts, joined, special_ids
from forescale.data.conversations.template import ROLES, ChatTemplate, Message, Piece, Unfit
from forescale.data.text.documents import ReadingReport
from forescale.data.text.opening import open_stream

_AT_ONCE = 512  # lines that are tokenised together
_FORMS = '{"prompt": ..., "response": ...} or {"messages": [...]}'


class Example(NamedTuple):
    """A conversation. ids: (tokens,); learned: (tokens,) bool, which of them are of responses;
    text: what decides whether it is held out."""

    ids: np.ndarray
    learned: np.ndarray
    text: bytes


class _Line(NamedTuple):
    number: int
    pieces: list[Piece]
    has_special: bool  # special tokens in the pieces are tokens, and no text
    text: bytes


@dataclass(frozen=True)
class Reader:
    """Reads a file of examples. most: tokens of the longest that is taken; end: id of the token
    that ends a text."""

    tokenizer: Tokenizer
    template: ChatTemplate
    end: int
    most: int

    def examples(self, path: str, faults: ReadingReport) -> Iterator[Example]:
        """Yield the examples of a file; what is none is added to `faults` with its line number."""
        found = self._lines(path, faults)
        while lines := list(islice(found, _AT_ONCE)):
            for line, parts in zip(lines, self._encoded(lines), strict=True):
                example = self._joined(line, parts)
                if len(example.ids) > self.most:
                    reason = f"longer than the {self.most:,} tokens of a row"
                    faults.add(reason, f"{line.number:,}, of {len(example.ids):,} tokens")
                else:
                    yield example

    def _lines(self, path: str, faults: ReadingReport) -> Iterator[_Line]:
        with open_stream(path, path) as file:
            for number, raw in enumerate(file, 1):
                if raw.isspace():
                    continue
                try:
                    row = _parsed(raw)
                    has_special = "messages" in row
                    if has_special:
                        pieces = self.template.pieces(_checked(row["messages"]))
                    else:
                        pieces = _of_texts(row)
                except Unfit as e:
                    faults.add(str(e), f"{number:,}")
                    continue
                yield _Line(number, pieces, has_special, json.dumps(row, sort_keys=True).encode())

    def _encoded(self, lines: Sequence[_Line]) -> list[list[list[int]]]:
        """Return the ids of each piece of each line."""
        found: list[list[list[int]]] = [[] for _ in lines]
        for has_special in (False, True):
            mine = [i for i, line in enumerate(lines) if line.has_special == has_special]
            texts = [(i, piece.text) for i in mine for piece in lines[i].pieces]
            encoded = encoded_parts(self.tokenizer, [text for _, text in texts], has_special)
            for (i, _), ids in zip(texts, encoded, strict=True):
                found[i].append(ids)
        return found

    def _joined(self, line: _Line, parts: list[list[int]]) -> Example:
        ids, learned = joined(line.pieces, parts, self.end, self._special_ids)
        return Example(np.array(ids), np.array(learned), line.text)

    @cached_property
    def _special_ids(self) -> set[int]:
        return special_ids(self.tokenizer)


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise Unfit("that are no valid JSON") from None
    has_messages = isinstance(row, dict) and "messages" in row
    has_texts = isinstance(row, dict) and {"prompt", "response"} <= row.keys()
    if has_messages == has_texts:
        raise Unfit(f"that are not {_FORMS}")
    kept = ("messages",) if has_messages else ("prompt", "response")
    return {name: row[name] for name in kept}


def _of_texts(row: Mapping[str, Any]) -> list[Piece]:
    prompt, response = _text(row["prompt"]), _text(row["response"])
    if not response.strip():
        raise Unfit("with an empty response")
    return [Piece(prompt, False), Piece(response, True)]


def _checked(messages: Any) -> Sequence[Message]:
    """Return the messages of a line. Raises Unfit."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Unfit('whose "messages" is no list of {"role": ..., "content": ...}')
    found = [{"role": m.get("role"), "content": _text(m.get("content"))} for m in messages]
    if any(m["role"] not in ROLES for m in found):
        raise Unfit(f"with a role that is none of {', '.join(ROLES)}")
    responses = [m["content"] for m in found if m["role"] == "assistant"]
    if not responses:
        raise Unfit("without a message of the assistant")
    if not all(text.strip() for text in responses):
        raise Unfit("with an empty response")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit("with something else than a text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Unfit("with half a character (a lone surrogate)")
    return value
