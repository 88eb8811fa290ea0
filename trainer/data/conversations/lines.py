"""JSON lines with an example each: read, checked, and made token ids.

    {"prompt": TEXT, "response": TEXT}                           the two texts as they are
    {"messages": [{"role": "user", "content": TEXT}, ...]}       by a chat template (template.py)

Preferences are lines of two of these each (preferences.py).

Invariant: every line is an example, or a fault that names it and its reason; blank lines are
neither. A prompt's ids and those of its response are made apart, as they are when a model writes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from forescale.data.conversations.ids import encoded_parts, joined, special_ids
from forescale.data.conversations.preferences import FORMS as PREFERENCES
from forescale.data.conversations.preferences import is_preference, two_lines
from forescale.data.conversations.template import ROLES, ChatTemplate, Message, Piece, Unfit
from forescale.data.text.documents import ReadingReport
from forescale.data.text.opening import open_stream
from forescale.errors import UserError

_AT_ONCE = 512  # lines that are tokenised together
_PEEKED = 100  # lines in which a file shows its kind
FORMS = '{"prompt": ..., "response": ...} or {"messages": [...]}'


class Example(NamedTuple):
    """A conversation, or the two of a preference, one after the other. ids: (tokens,); learned:
    (tokens,) bool, which of them are of responses; text: what decides whether it is held out."""

    ids: np.ndarray
    learned: np.ndarray
    text: bytes


class _Line(NamedTuple):
    number: int
    pieces: list[Piece]
    has_special: bool  # special tokens in the pieces are tokens, and no text
    text: bytes
    chosen: int | None = None  # pieces of the chosen conversation, of a preference


@dataclass(frozen=True)
class Reader:
    """Reads a file of examples. most: tokens of the longest that is taken; end: id of the token
    that ends a text; are_preferences: whether the lines are such."""

    tokenizer: Tokenizer
    template: ChatTemplate
    end: int
    most: int
    are_preferences: bool = False

    def examples(self, path: str, faults: ReadingReport) -> Iterator[Example]:
        """Yield the examples of a file; what is none is added to `faults` with its line number."""
        found = self._lines(path, faults)
        while lines := list(islice(found, _AT_ONCE)):
            for line, parts in zip(lines, self._encoded(lines), strict=True):
                example, longest = self._example(line, parts)
                if longest > self.most:
                    reason = f"longer than the {self.most:,} tokens of a row"
                    faults.add(reason, f"{line.number:,}, of {longest:,} tokens")
                else:
                    yield example

    def _lines(self, path: str, faults: ReadingReport) -> Iterator[_Line]:
        with open_stream(path, path) as file:
            for number, raw in enumerate(file, 1):
                if raw.isspace():
                    continue
                try:
                    yield self._line(number, _parsed(raw))
                except Unfit as e:
                    faults.add(str(e), f"{number:,}")

    def _line(self, number: int, row: Any) -> _Line:
        if is_preference(row) != self.are_preferences:
            raise Unfit(f"that are not {PREFERENCES if self.are_preferences else FORMS}")
        if not self.are_preferences:
            row = _checked_form(row)
            has_special = "messages" in row
            return _Line(number, self._pieces(row), has_special, _bytes(row))
        chosen, rejected, prompt = two_lines(row)
        of_chosen, of_rejected = self._pieces(chosen), self._pieces(rejected)
        return _Line(
            number,
            of_chosen + of_rejected,
            "messages" in chosen,
            _bytes(prompt),  # so that no prompt is in both splits
            len(of_chosen),
        )

    def _pieces(self, row: Mapping[str, Any]) -> list[Piece]:
        if "messages" in row:
            return self.template.pieces(_checked(row["messages"]))
        return _of_texts(row)

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

    def _example(self, line: _Line, parts: list[list[int]]) -> tuple[Example, int]:
        """Return the example of a line, and the tokens of its longest conversation."""
        if line.chosen is None:
            ids, learned = joined(line.pieces, parts, self.end, self._special_ids)
            return Example(np.array(ids), np.array(learned), line.text), len(ids)
        all_ids: list[int] = []
        all_learned: list[bool] = []
        longest = 0
        for of in (slice(0, line.chosen), slice(line.chosen, None)):
            pieces, own = line.pieces[of], parts[of]
            ids, _ = joined(pieces, own, self.end, self._special_ids)
            before, _ = joined(pieces[:-1], own[:-1], self.end, self._special_ids)
            all_ids += ids
            all_learned += [i >= len(before) for i in range(len(ids))]  # the last response alone
            longest = max(longest, len(ids))
        return Example(np.array(all_ids), np.array(all_learned), line.text), longest

    @cached_property
    def _special_ids(self) -> set[int]:
        return special_ids(self.tokenizer)


def has_preferences(path: str | Path) -> bool:
    """True if the first line of a file that is JSON is a preference. False also for a file that
    can't be read, which who reads all of it reports."""
    try:
        with open_stream(str(path), str(path)) as file:
            for raw in islice(file, _PEEKED):
                with suppress(Unfit):
                    return is_preference(_parsed(raw))
    except (OSError, UserError):
        return False
    return False


def _parsed(raw: bytes) -> Any:
    """Return the value of a line. Raises Unfit if it is no JSON."""
    try:
        return json.loads(raw.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise Unfit("that are no valid JSON") from None


def _checked_form(row: Any) -> dict[str, Any]:
    has_messages = isinstance(row, dict) and "messages" in row
    has_texts = isinstance(row, dict) and {"prompt", "response"} <= row.keys()
    if has_messages == has_texts:
        raise Unfit(f"that are not {FORMS}")
    kept = ("messages",) if has_messages else ("prompt", "response")
    return {name: row[name] for name in kept}


def _bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


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
