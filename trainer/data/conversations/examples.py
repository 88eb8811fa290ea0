"""JSON lines with an example each, read, checked and tokenised.

    {"prompt": TEXT, "response": TEXT}                               the two texts as they are
    {"messages": [MESSAGE, ...]}                                     by a chat template

A preference has two responses to one prompt, of which people chose one:

    {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}               the texts as they are
    {"messages": [...], "chosen": MESSAGE, "rejected": MESSAGE}      by a chat template
    {"prompt": [...], "chosen": [...], "rejected": [...]}            the same, as TRL has it
    {"chosen": [...], "rejected": [...]}                             the same, each a whole chat

A MESSAGE is {"role": ..., "content": TEXT}; as a chosen or rejected one, a text is the assistant's.

Invariant: every line is an example, or a fault with its number and its reason; blank lines are
neither. A prompt and its response are tokenised apart, as when a model writes. The two
conversations of a preference differ in their last response alone, and only that is learned.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from forescale.data.conversations.template import (
    ROLES,
    ChatTemplate,
    Message,
    Piece,
    Unfit,
    encoded_parts,
    joined,
    special_ids,
)
from forescale.data.text.documents import ReadingReport
from forescale.data.text.opening import open_stream
from forescale.ground.errors import UserError

_BATCH = 512  # lines that are tokenised together
_PEEKED = 100  # lines that may show the kind of a file
EXAMPLES = '{"prompt": ..., "response": ...} or {"messages": [...]}'
PREFERENCES = '{"prompt": ..., "chosen": ..., "rejected": ...}'
_SIDES = ("chosen", "rejected")


class Example(NamedTuple):
    """A conversation, or the two of a preference, one after the other. ids: (tokens,); learned:
    (tokens,) bool, True for tokens of responses; text: its hash decides whether the example is held
    out."""

    ids: np.ndarray
    learned: np.ndarray
    text: bytes


class _Line(NamedTuple):
    number: int
    conversations: list[list[Piece]]  # one, or the chosen and the rejected one
    has_special: bool  # the texts of special tokens become these tokens
    text: bytes


@dataclass(frozen=True)
class Reader:
    """Reads a file of examples, or of preferences. end: id of the token that ends a text; most:
    tokens of the longest conversation that is allowed."""

    tokenizer: Tokenizer
    template: ChatTemplate
    end: int
    most: int
    are_preferences: bool = False

    def examples(self, path: str, faults: ReadingReport) -> Iterator[Example]:
        """Yield the examples of a file; add the other lines to `faults` with their numbers."""
        special = special_ids(self.tokenizer)
        lines = self._lines(path, faults)
        while batch := list(islice(lines, _BATCH)):
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
                longest = 0
                for pieces in line.conversations:
                    parts = list(islice(encoded[line.has_special], len(pieces)))
                    tokens, are_learned = joined(pieces, parts, self.end, special)
                    if self.are_preferences:  # the last response alone
                        before, _ = joined(pieces[:-1], parts[:-1], self.end, special)
                        are_learned = [i >= len(before) for i in range(len(tokens))]
                    ids += tokens
                    learned += are_learned
                    longest = max(longest, len(tokens))
                if longest > self.most:
                    reason = f"longer than the {self.most:,} tokens of a row"
                    faults.add(reason, f"{line.number:,}, of {longest:,} tokens")
                else:
                    yield Example(np.array(ids), np.array(learned), line.text)

    def _lines(self, path: str, faults: ReadingReport) -> Iterator[_Line]:
        with open_stream(path, path) as file:
            for number, raw in enumerate(file, 1):
                if raw.isspace():
                    continue
                try:
                    row = _parsed(raw)
                    if is_preference(row) != self.are_preferences:
                        forms = PREFERENCES if self.are_preferences else EXAMPLES
                        raise Unfit(f"that are not {forms}")
                    if self.are_preferences:
                        # The prompt decides, so that no prompt is in both splits.
                        *rows, key = two_lines(row)
                    else:
                        has_messages = isinstance(row, dict) and "messages" in row
                        has_texts = isinstance(row, dict) and {"prompt", "response"} <= row.keys()
                        if has_messages == has_texts:
                            raise Unfit(f"that are not {EXAMPLES}")
                        names = ("messages",) if has_messages else ("prompt", "response")
                        rows = [key := {name: row[name] for name in names}]
                    text = json.dumps(key, sort_keys=True).encode()
                    conversations = [self._pieces(row) for row in rows]
                    yield _Line(number, conversations, "messages" in rows[0], text)
                except Unfit as e:
                    faults.add(str(e), f"{number:,}")

    def _pieces(self, row: Mapping[str, Any]) -> list[Piece]:
        if "messages" in row:
            return self.template.pieces(_checked_messages(row["messages"]))
        prompt, response = _checked_text(row["prompt"]), _checked_text(row["response"])
        if not response.strip():
            raise Unfit("with an empty response")
        return [Piece(prompt, False), Piece(response, True)]


def has_preferences(path: str | Path) -> bool:
    """True if the first line of a file that is JSON is a preference. False also for a file that
    can't be read; its reader reports that."""
    try:
        with open_stream(str(path), str(path)) as file:
            for raw in islice(file, _PEEKED):
                with suppress(Unfit):
                    return is_preference(_parsed(raw))
    except (OSError, UserError):
        return False
    return False


def is_preference(row: Any) -> bool:
    """True if a parsed line has two responses."""
    return isinstance(row, dict) and set(_SIDES) <= row.keys()


def two_lines(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return chosen and rejected example of a preference, and their prompt. Raises Unfit."""
    equal = Unfit("whose chosen and rejected responses are equal")
    if isinstance(row.get("prompt"), str) and all(isinstance(row[side], str) for side in _SIDES):
        prompt = row["prompt"]
        if row["chosen"] == row["rejected"]:
            raise equal
        chosen, rejected = ({"prompt": prompt, "response": row[side]} for side in _SIDES)
        return chosen, rejected, prompt
    chats = [_whole_chat(row, side) for side in _SIDES]
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


def _parsed(raw: bytes) -> Any:
    """Return the value of a line. Raises Unfit if it is no JSON."""
    try:
        return json.loads(raw.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise Unfit("that are no valid JSON") from None


def _checked_messages(messages: Any) -> Sequence[Message]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Unfit('whose "messages" is no list of {"role": ..., "content": ...}')
    chat = [{"role": m.get("role"), "content": _checked_text(m.get("content"))} for m in messages]
    if any(m["role"] not in ROLES for m in chat):
        raise Unfit(f"with a role that is none of {', '.join(ROLES)}")
    responses = [m["content"] for m in chat if m["role"] == "assistant"]
    if not responses:
        raise Unfit("without a message of the assistant")
    if not all(text.strip() for text in responses):
        raise Unfit("with an empty response")
    return chat


def _checked_text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit("with something else than a text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Unfit("with half a character (a lone surrogate)")
    return value
