"""What a command tells programs: with --json one JSON document; of some verbs, JSON lines.

Invariant: while a command with --json runs, standard output gets nothing else. All that is printed,
also by processes that the command starts, goes to standard error. The document of a command that
fails holds `error`: alone, or beside what was known before.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from typing import Any, TextIO

FLAG = "--json"
_WORD = re.compile(r"(?:plan\.)?json=(true|false)", re.IGNORECASE)


class _Output:
    """Standard output for programs, and the document that is printed at the end."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.facts: dict[str, Any] = {}
        self.has_lines = False

    def write(self, facts: Mapping[str, Any], indent: int | None = None) -> None:
        text = json.dumps(plain(facts), indent=indent, allow_nan=False)
        self.stream.write(text + "\n")
        self.stream.flush()


_output: _Output | None = None  # of the command that runs with --json


def taken_from(words: Sequence[str]) -> tuple[list[str], bool]:
    """Return a command's words without --json and json=true, and whether they ask for JSON. What
    follows `--` belongs to another command."""
    end = list(words).index("--") if "--" in words else len(words)
    rest, asks = list[str](), False
    for word in words[:end]:
        if word == FLAG:
            asks = True
        elif match := _WORD.fullmatch(word):
            asks = match[1].lower() == "true"
        else:
            rest.append(word)
    return [*rest, *words[end:]], asks


def is_json() -> bool:
    """Return True while a command with --json runs."""
    return _output is not None


def tell(facts: Mapping[str, Any]) -> None:
    """Keep facts for the document, printed when the command ends; without --json do nothing."""
    if _output:
        _output.facts |= facts


def tell_line(facts: Mapping[str, Any]) -> None:
    """Print facts as one line of JSON, at once; without --json do nothing."""
    if _output:
        _output.has_lines = True
        _output.write(facts)


@contextmanager
def for_programs(asks: bool) -> Iterator[None]:
    """Within the block, standard output is for programs, if a command asks for JSON."""
    global _output
    if not asks or sys.stdout is None or _output:
        yield
        return
    before, descriptor = sys.stdout, None
    beneath = getattr(before, "rich_proxied_file", before)
    with suppress(OSError, AttributeError, ValueError):
        if beneath.fileno() == 1:  # processes that are started inherit it
            beneath.flush()
            descriptor = os.dup(1)
            os.dup2(2, 1)
            beneath = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    _output, sys.stdout = _Output(beneath), sys.stderr
    try:
        yield
    finally:
        output, _output, sys.stdout = _output, None, before
        try:
            if output.facts or not output.has_lines:  # an error after lines is a line, too
                output.write(output.facts, None if output.has_lines else 2)
        except BrokenPipeError:  # the reader has closed it
            if descriptor is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if descriptor is not None:
            beneath.close()
            os.dup2(descriptor, 1)
            os.close(descriptor)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: a dataclass as an object, a number of numpy as one of Python,
    NaN and infinities as null, everything else as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)
