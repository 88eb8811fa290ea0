"""Rows of examples: where they stand, and what a row may be.

They stand in JSON lines, a JSON list, a parquet file or a data set of the hub (hf://). A row is

    {"prompt": TEXT, "response": TEXT}       the two texts as they are; also "completion"
    {"prompt": [...], "completion": [...]}   messages
    {"messages": [MESSAGE, ...]}             a chat; with "tools": [...], those that it may call
    {"conversations": [...]}                 the same of ShareGPT: {"from": "human", "value": TEXT}
    {"instruction": TEXT, "output": TEXT}    Alpaca, with "input" and "system": one turn

or a preference, with "chosen" and "rejected" (see prepare.py). Other fields are not read.

Invariant: a row is one of these by its keys alone, or it is a fault with its number.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from forescale.data.conversations.division import Message, Unfit
from forescale.data.text.formats import lines_between
from forescale.data.text.opening import HUB, Budget, open_stream
from forescale.data.text.tables import load_hub, open_parquet
from forescale.ground.errors import UserError
from forescale.ground.foreign import read_bytes
from forescale.ground.storage import hash_file

EXAMPLES = (
    '{"prompt": ..., "response": ...}, {"prompt": ..., "completion": ...}, {"messages": [...]}, '
    '{"conversations": [...]} or {"instruction": ..., "output": ...}'
)
SIDES = ("chosen", "rejected")
_LONGEST = 16 << 20  # bytes of a line; a conversation of a million tokens has a third of it
_LARGEST = 1 << 30  # bytes of a JSON list, which is read whole
_ROWS = 128  # of a table, decoded at once
_ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_SPEAKERS |= {"function_response": "tool", "function_call": "assistant"}
_TEXTS = ("name", "tool_call_id", "reasoning_content")  # what templates read of a message besides


def rows_of(path: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file or a data set with their numbers from 1; in the place of one that is
    no JSON, or too long, an Unfit. Blank lines are no rows. Raises UserError."""
    if path.startswith(HUB):
        yield from enumerate(map(_without_nulls, load_hub(path)), 1)
    elif path.endswith(".parquet"):
        with open_parquet(path) as file:
            batches = file.iter_batches(_ROWS, use_threads=False)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from enumerate(map(_without_nulls, rows), 1)
    elif _is_list(path):
        try:
            yield from enumerate(json.loads(read_bytes(path, _LARGEST)), 1)
        except (ValueError, RecursionError):
            raise UserError(path, "is no valid JSON", "write it again") from None
    else:
        with open_stream(path, path) as file:
            lines = lines_between(file, Budget(path, path, _LONGEST))
            for number, (_, raw) in enumerate(lines, 1):
                if raw is None or not raw.isspace():
                    yield number, _parsed(raw)


def unit_of(path: str) -> str:
    """Return what the numbers of `rows_of` count."""
    return "row" if path.startswith(HUB) or path.endswith((".parquet", ".json")) else "line"


def digest_of(path: str) -> str:
    """Return a hash of what `rows_of` reads."""
    fingerprint = str(load_hub(path)._fingerprint) if path.startswith(HUB) else None
    return fingerprint or hash_file(Path(path)).sha256


def _is_list(path: str) -> bool:
    if not path.endswith(".json"):
        return False
    with open_stream(path, path) as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _parsed(raw: bytes | None) -> Any:
    if raw is None:
        return Unfit(f"of more than {_LONGEST >> 20} MiB")
    try:
        return json.loads(raw.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return Unfit("that are no valid JSON")


def _without_nulls(value: Any) -> Any:
    """Return a value without the fields that are null: in a table each row has the fields of
    all."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [*map(_without_nulls, value)] if isinstance(value, list) else value


def canonical(row: Any) -> dict[str, Any]:
    """Return a row as {"prompt", "response"}, {"messages"} or a preference. Raises Unfit."""
    if isinstance(row, Unfit):
        raise row
    if not isinstance(row, dict):
        raise Unfit(f"that are not {EXAMPLES}")
    if set(SIDES) <= row.keys():
        before = {"prompt": row["conversations"]} if "conversations" in row else {}
        return {k: _renamed(v) for k, v in (row | before).items()}
    fit = [make for keys, make in _FORMS if all(row.get(key) is not None for key in keys)]
    if len(fit) != 1:
        raise Unfit(f"that are not {EXAMPLES}")
    return fit[0](row)


def _of_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, response = row["prompt"], row.get("response", row.get("completion"))
    if not (isinstance(prompt, list) and isinstance(response, list)):
        return {"prompt": prompt, "response": response}
    if any(isinstance(m, dict) and m.get("role") == "assistant" for m in prompt):
        raise Unfit("with a response in the prompt, which would be learned too")
    return _of_messages({"messages": prompt + response, "tools": row.get("tools")})


def _of_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    with_tools = {"tools": _json_of(tools)} if tools else {}
    return {"messages": _without_nulls(row["messages"]), **with_tools}


def _of_speakers(row: Mapping[str, Any]) -> dict[str, Any]:
    chat = _renamed(row["conversations"])
    if row.get("system") and isinstance(chat, list):
        chat = [{"role": "system", "content": row["system"]}, *chat]
    return _of_messages({"messages": chat, "tools": row.get("tools")})


def _of_instruction(row: Mapping[str, Any]) -> dict[str, Any]:
    if row.get("history"):
        raise Unfit('with a "history", which is not read; write "messages"')
    parts = [row["instruction"], row.get("input") or ""]
    question = "\n\n".join(parts) if all(isinstance(p, str) and p for p in parts) else parts[0]
    turns = [("user", question), ("assistant", row["output"])]
    turns = [("system", row["system"]), *turns] if row.get("system") else turns
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], dict[str, Any]]], ...] = (
    (("prompt", "response"), _of_texts),
    (("prompt", "completion"), _of_texts),
    (("messages",), _of_messages),
    (("conversations",), _of_speakers),
    (("instruction", "output"), _of_instruction),
)


def _renamed(chat: Any) -> Any:
    """Return messages, or one, with the names of ShareGPT replaced."""
    if isinstance(chat, list):
        return [*map(_renamed, chat)]
    if not isinstance(chat, dict) or "from" not in chat:
        return chat
    role, text = chat["from"], chat.get("value")
    message = {"role": _SPEAKERS.get(role, role) if isinstance(role, str) else role}
    if role == "function_call":
        calls = _json_of(text)
        return message | {"tool_calls": calls if isinstance(calls, list) else [calls]}
    return message | {"content": text}


def _json_of(value: Any) -> Any:
    """Return what a text of JSON holds, as tables have it in the place of other values."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def checked_messages(row: Mapping[str, Any], template: str) -> Sequence[Message]:
    """Return the messages of a canonical row; the first has its tools. template: the source of the
    chat template. Raises Unfit for what is no chat, and for what the template would leave out."""
    messages, tools = row["messages"], row.get("tools")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Unfit('whose "messages" is no list of {"role": ..., "content": ...}')
    chat = [_message(m) for m in messages]
    if any(m["role"] not in _ROLES for m in chat):
        raise Unfit(f"with a role that is none of {', '.join(_ROLES)}")
    responses = [m for m in chat if m["role"] == "assistant"]
    if not responses:
        raise Unfit("without a message of the assistant")
    if not all(m["content"].strip() or m.get("tool_calls") for m in responses):
        raise Unfit("with an empty response")
    if tools is not None and not (isinstance(tools, list) and all(map(_is_object, tools))):
        raise Unfit('whose "tools" is no list of objects')
    if tools:
        chat[0] = {**chat[0], "tools": tools}
    for key in ("tools", "tool_calls", "reasoning_content"):
        if key not in template and any(key in m for m in chat):
            raise Unfit(f"with {key}, which the chat template doesn't write")
    return chat


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list) and all(
        _is_object(p) and p.get("type") == "text" for p in content
    ):
        texts = [p.get("text") for p in content]
        content = "".join(texts) if all(isinstance(t, str) for t in texts) else None
    content = "" if content is None and calls else checked_text(content)
    others = {k: checked_text(message[k]) for k in _TEXTS if message.get(k) is not None}
    with_calls = {"tool_calls": _calls(calls)} if calls else {}
    return {"role": message.get("role"), "content": content, **others, **with_calls}


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Return the calls of tools as templates read them, with arguments that are objects."""
    unfit = Unfit('whose "tool_calls" is no list of {"function": {"name": ..., "arguments": {}}}')
    if not isinstance(calls, list) or not all(map(_is_object, calls)):
        raise unfit
    ready = []
    for call in calls:
        function = call.get("function", call)
        arguments = _json_of(function.get("arguments", {})) if _is_object(function) else None
        if not _is_object(arguments) or not isinstance(function.get("name"), str):
            raise unfit
        named = {"name": function["name"], "arguments": arguments}
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        ready.append({"type": "function", **identity, "function": named})
    return ready


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def checked_text(value: Any) -> str:
    """Return a text. Raises Unfit for anything else."""
    if not isinstance(value, str):
        raise Unfit("with something else than a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unfit("with half a character (a lone surrogate)") from None
    return value
