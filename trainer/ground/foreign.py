"""Files that others wrote, read within bounds: what kind of file, how many bytes, how deep a tree.

Invariant: only a regular file is opened, or a pipe of the shell's own, as <(command) is: no pipe
without a writer makes a command wait, and no device feeds it without end. Of a file that is read
whole, no more is in memory than its reader allows.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from forescale.ground.errors import Transient, UserError, storage_error

SMALL = 16 << 20  # bytes of a file of settings; published ones have up to 2 MB
LARGE = 100_000_000  # of the names of all weights
_OF_SHELL = ("/dev/fd/", "/dev/stdin")
_DEEPEST = 100  # levels of a tree; Rust's parsers allow 128
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def open_fd(path: str | Path) -> int:
    """Return the descriptor of a regular file or a pipe of the shell's, open for reading. Raises
    UserError for anything else, at once, and OSError."""

    def expect_regular(mode: int) -> None:
        has_writer = stat.S_ISFIFO(mode) and str(path).startswith(_OF_SHELL)
        if not (stat.S_ISREG(mode) or has_writer):
            kind = _KINDS.get(stat.S_IFMT(mode), "a device")
            raise UserError(str(path), f"is {kind}, not a regular file", "give a file")

    expect_regular(os.stat(path).st_mode)  # first: to open a device may change it
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        expect_regular(os.fstat(fd).st_mode)  # a pipe may have taken its place meanwhile
    except UserError:
        os.close(fd)
        raise
    os.set_blocking(fd, True)
    return fd


def open_regular(path: str | Path, buffered: bool = False) -> BinaryIO:
    """Return a regular file, open for reading. Errors as of open_fd."""
    return os.fdopen(open_fd(path), "rb", -1 if buffered else 0)


def read_bytes(path: str | Path, most: int = SMALL, todo: str = "check the path") -> bytes:
    """Return the content of a regular file. Raises UserError if there is none, if it can't be read,
    or has more than `most` bytes. todo: what to do about a missing one."""
    blocks, left = list[bytes](), most + 1
    try:
        with open_regular(path) as file:
            while left and (block := file.read(left)):
                blocks.append(block)
                left -= len(block)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(str(path), "no such file", todo) from None
    except OSError as e:
        e.filename = e.filename or str(path)  # reading names none
        if isinstance(error := storage_error(e), Transient):
            raise error from e
        raise UserError(str(path), f"can't be read ({e.strerror})", "restore the file") from None
    except ValueError as e:  # a zero character
        raise UserError(repr(str(path)), f"is no path ({e})", todo) from None
    if not left:
        raise UserError(str(path), f"has more than {most:,} bytes", "give the intact file")
    return b"".join(blocks)


def read_text(path: str | Path, most: int = SMALL, todo: str = "check the path") -> str:
    """Return the text of a file, as read_bytes does. Raises UserError if it isn't UTF-8."""
    try:
        return read_bytes(path, most, todo).decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(str(path), f"isn't UTF-8 (byte {e.start})", "restore the file") from None


def parse_json(raw: bytes | str, where: str | Path) -> Any:
    """Return the value of a JSON text. Raises UserError if it is none, if an object has a key
    twice, or if it is nested too deeply to be walked."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # A flipped bit can turn one key into another, which would hide it.
        if len(values := dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice")
        return values

    try:
        value = json.loads(raw, object_pairs_hook=unique)
        level: list[Any] = [[value]]
        for _ in range(_DEEPEST + 1):
            trees = (v.values() if isinstance(v, dict) else v for v in level)
            if not (level := [v for tree in trees for v in tree if isinstance(v, dict | list)]):
                return value
        raise ValueError(f"it has more than {_DEEPEST} levels")
    except (ValueError, RecursionError) as e:
        problem = f"not valid JSON ({e})"
        raise UserError(str(where), problem, "restore the file or rebuild it") from e


def read_object(
    path: str | Path, most: int = SMALL, todo: str = "check the path"
) -> dict[str, Any]:
    """Return the JSON object in a file, with read_bytes and parse_json. Raises UserError if it is
    another value, or has a text that can't be written."""
    value = parse_json(read_bytes(path, most, todo), path)
    if not isinstance(value, dict):
        raise UserError(str(path), "is not a JSON object", todo)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(str(path), "holds half a character (a lone surrogate)", todo) from None
    return value
