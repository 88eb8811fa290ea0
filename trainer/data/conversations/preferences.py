"""Preferences: lines with two responses to one prompt, of which people chose one.

    {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}               the texts as they are
    {"messages": [...], "chosen": MESSAGE, "rejected": MESSAGE}      by a chat template
    {"prompt": [...], "chosen": [...], "rejected": [...]}            the same, as TRL has it
    {"chosen": [...], "rejected": [...]}                             the same, each a whole chat

A message is {"role": ..., "content": TEXT}, [...] a list of them; in the second form a text is the
assistant's.

Invariant: a preference becomes two ordinary lines of lines.py, the chosen one and the rejected one,
which differ in their last response alone; only that is learned.
"""

from collections.abc import Mapping
from typing import Any

from forescale.data.conversations.template import Unfit

FORMS = '{"prompt": ..., "chosen": ..., "rejected": ...}'
_SIDES = ("chosen", "rejected")


def is_preference(row: Any) -> bool:
    """True if a parsed line is of this kind."""
    return isinstance(row, dict) and set(_SIDES) <= row.keys()


def two_lines(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return the chosen line and the rejected one, each as lines.py reads it, and their prompt.
    Raises Unfit."""
    if isinstance(row.get("prompt"), str) and all(isinstance(row[side], str) for side in _SIDES):
        prompt = row["prompt"]
        chosen, rejected = ({"prompt": prompt, "response": row[side]} for side in _SIDES)
        _expect_different(row["chosen"], row["rejected"])
        return chosen, rejected, prompt
    chats = [_chat(row, side) for side in _SIDES]
    *before, last = chats[0]
    *other, rejected_last = chats[1]
    if before != other:
        raise Unfit("whose chosen and rejected chats differ before their last message")
    if not all(isinstance(m, dict) and m.get("role") == "assistant" for m in (last, rejected_last)):
        raise Unfit("whose chosen or rejected message is not the assistant's")
    _expect_different(last.get("content"), rejected_last.get("content"))
    return {"messages": chats[0]}, {"messages": chats[1]}, before


def _chat(row: Mapping[str, Any], side: str) -> list[Any]:
    """Return the whole chat of a side."""
    own, before = row[side], row.get("messages", row.get("prompt"))
    if isinstance(own, str) and isinstance(before, list):
        own = [{"role": "assistant", "content": own}]
    own = [own] if isinstance(own, dict) else own
    if not isinstance(own, list) or not own:
        raise Unfit(f"that are not {FORMS}")
    is_whole = isinstance(own[0], dict) and own[0].get("role") != "assistant"
    if is_whole:  # the prompt stands in it, whatever the line says beside it
        return own
    if isinstance(before, str):
        before = [{"role": "user", "content": before}]
    if not isinstance(before, list):
        raise Unfit("without a prompt")
    return [*before, *own]


def _expect_different(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise Unfit("whose chosen and rejected responses are equal")
