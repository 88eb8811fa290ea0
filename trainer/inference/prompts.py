"""Prompts from standard input and files: one prompt, or one per line.

Invariant: input that isn't UTF-8 or is too large is a UserError.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from forescale.ground.errors import UserError

_MAX_BYTES = 16 << 20  # of a file of prompts, and of a line


def whole_input() -> str:
    """Return the text on standard input, without the line end that `echo` adds. Raises
    UserError."""
    return _without_end(_decoded(_raw_input(), "prompt", "standard input"))


def prompts_in(name: str) -> list[str]:
    """Return the prompts of a file, "-" for standard input: one a line, and in a .jsonl file a text
    or an object with `prompt` a line. Raises UserError."""
    if name == "-":
        text = _decoded(_raw_input(), "input", "standard input")
    else:
        path = Path(name).expanduser()
        try:
            with path.open("rb") as file:
                raw = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            raise UserError(str(path), "there is no such file", "name a file of prompts") from None
        if len(raw) > _MAX_BYTES:
            problem = f"has more than {_MAX_BYTES:,} bytes"
            raise UserError(str(path), problem, "split it into several files")
        text = _decoded(raw, name, "")
    if not text:
        raise UserError(name, "holds no prompt", "write one a line")
    lines = _without_end(text).split("\n")
    if Path(name).suffix != ".jsonl":
        return [line.removesuffix("\r") for line in lines]
    return [_prompt_of(line, f"{name}, line {i}") for i, line in enumerate(lines, 1)]


def typed_lines(mark: str) -> Iterator[str]:
    """Yield the lines of standard input as they come, without their ends, until it ends. mark: what
    a terminal shows before a line. Raises UserError for a line that isn't UTF-8."""
    stream = sys.stdin
    if stream is None:
        raise UserError("interactive", "standard input is closed", "write prompt=TEXT")
    if stream.isatty():
        import readline  # noqa: F401 - by its import, lines can be edited and called back

        while True:
            try:
                yield input(mark)
            except EOFError:
                return
    while raw := stream.buffer.readline(_MAX_BYTES + 1):
        if len(raw) > _MAX_BYTES:
            raise UserError(
                "interactive", f"a line has more than {_MAX_BYTES:,} bytes", "give less"
            )
        yield _without_end(_decoded(raw, "interactive", "standard input"))


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        todo = 'write "TEXT" or {"prompt": "TEXT"}'
        raise UserError(where, "is neither a text nor an object with the text `prompt`", todo)
    return value


def _raw_input() -> bytes:
    if sys.stdin is None:
        raise UserError("prompt", "standard input is closed", "write prompt=TEXT")
    raw = sys.stdin.buffer.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        problem = f"standard input has more than {_MAX_BYTES:,} bytes"
        raise UserError("prompt", problem, "give its last part, such as with tail -c 100000")
    return raw


def _decoded(raw: bytes, where: str, source: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        problem = f"{source} isn't UTF-8 (byte {e.start})".strip()
        raise UserError(where, problem, "convert it with iconv -t utf-8") from None


def _without_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
