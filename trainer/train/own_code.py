"""Errors in the user's own code that a retry would only meet again: they end the run with one
sentence, not with three restarts.

Invariant: only an error whose kind doesn't depend on the machine, in the first step that a process
makes, counts. All others keep their traceback and are tried again.
"""

import re
import traceback
from collections.abc import Collection

from forescale.errors import UserError

_KINDS = (
    *(TypeError, AttributeError, NameError, ImportError, AssertionError),
    *(IndexError, KeyError, ValueError, NotImplementedError),
)
# Of the many RuntimeErrors those that shapes and types decide, and not memory, devices or peers.
_OF_SHAPES = re.compile(r"shape|size|dimension|broadcast|dtype|must match|must have|expected .* to")
_COMPILED = re.compile(r'File "([^"]+)", line (\d+)')
_LONGEST = 300  # characters of a message


def as_users(error: Exception, classes: Collection[str]) -> UserError | None:
    """Return the UserError for an error of the user's own code, with the last line of it that ran;
    None if it isn't one, or if another try may not meet it.

    classes: dotted names of the user's own classes. What lies in their packages is the user's.
    """
    if isinstance(error, UserError) or not _is_certain(error):
        return None
    if (line := _users_line(error, classes)) is None:
        return None
    problem = f"{type(error).__name__}: {_first_line(error)}"
    return UserError(line, problem, "correct it, and give the same command again")


def described(error: BaseException, classes: Collection[str]) -> str:
    """Return an error in one line: its kind, its message, and the user's line that it came from."""
    line = _users_line(error.__cause__ or error, classes)
    return f"{type(error).__name__}: {_first_line(error)}{f', {line}' if line else ''}"


def _users_line(error: BaseException, classes: Collection[str]) -> str | None:
    tops = {name.partition(".")[0] for name in classes}
    lines = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in tops:
            lines.append((frame.f_code.co_filename, line))
    if not lines and "from user code" in str(error):  # of torch.compile's error only its text
        lines = _COMPILED.findall(str(error))
    return f"{lines[-1][0]}, line {lines[-1][1]}" if lines else None


def _is_certain(error: Exception) -> bool:
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        return is_of_shapes(error)
    return isinstance(error, _KINDS)


def is_of_shapes(error: Exception) -> bool:
    """Return True for a RuntimeError of torch that shapes and types decide, and not a device."""
    text = str(error)
    is_of_device = "CUDA" in text or "NCCL" in text or "OutOfMemory" in type(error).__name__
    is_runtime = isinstance(error, RuntimeError) and not is_of_device
    return is_runtime and _OF_SHAPES.search(text) is not None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:_LONGEST]
