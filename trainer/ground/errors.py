"""UserError, for problems that the user can fix; Transient, for faults that may go away, and trying
again; what ends a verb that Python calls; and the exit codes that the launcher acts on.

Invariant: a problem of the user's (a wrong key, a missing file, a full disk) is raised as a
UserError and ends the command with code 2 and one sentence, without a traceback. A fault that may
go away by itself (storage or a server that fails for a moment) is a Transient: one sentence too,
but with code 1, so that the launcher tries again. Every other exception is a bug of this project
and keeps its traceback.

The secrets of addresses (passwords, tokens, signatures) never stand in a sentence or a file. An
address is written with the name of an environment variable instead, which is read at each request:

    https://$FORESCALE_SECRET_LOGIN@host/data     FORESCALE_SECRET_LOGIN=user:password
    https://host/data?$FORESCALE_SECRET_SAS       FORESCALE_SECRET_SAS='sv=...&sig=...'

Invariant: `masked` removes every secret that `secret_in` finds, and whole queries besides.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote

DONE = 0
CRASHED = 1  # any other error: the launcher tries again a few times
USER = 2  # the config or the input is wrong: never tried again
INTERRUPTED = 75  # saved: the same command resumes
GAVE_UP = 76  # too many crashes in a row without a new checkpoint
EXIT_CODES = {
    DONE: "done",
    CRASHED: "a fault of forescale, a fault that may go away by itself, or a drill not survived",
    USER: "the command, the config or the input is wrong, or `check` found faults: change it first",
    INTERRUPTED: "interrupted: the same command resumes",
    GAVE_UP: "too many crashes in a row without a new checkpoint: read `forescale logs RUN`",
}

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)  # seconds between the tries of `retried`
T = TypeVar("T")
_LONGEST = 1000  # characters of each part of a sentence


def shortened(text: str, most: int) -> str:
    """Return text of at most `most` characters: of a longer one its begin and its end."""
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[-(most // 2 - 2) :]}"


class _Sentence(BaseException):
    """An exception whose text says all: IPython shows it without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows, which calls this where an exception has it."""
        return [f"{type(self).__name__}: {self}"]


class UserError(_Sentence, Exception):
    """Wrong input. where: the key or file; problem: what is wrong; todo: what to do."""

    code = USER  # exit code of the command

    def __init__(self, where: str, problem: str, todo: str):
        super().__init__(where, problem, todo)
        self.where, self.problem, self.todo = str(where), problem, todo

    def __str__(self) -> str:
        """The sentence: one line, however long the parts are, and without secrets of addresses."""
        end = "" if self.todo.endswith("?") else "."
        where, problem, todo = self._parts
        return masked(f"{where}: {problem}; {todo}{end}").replace("\r", "\\r").replace("\n", "\\n")

    @property
    def _parts(self) -> tuple[str, ...]:
        return tuple(shortened(part, _LONGEST) for part in (self.where, self.problem, self.todo))

    def facts(self) -> dict[str, Any]:
        """Return the parts of the sentence, for programs."""
        return dict(zip(("subject", "problem", "todo"), map(masked, self._parts), strict=True))


class CommandFailed(_Sentence, Exception):
    """A verb that Python called, and that ended before it was complete. code: as of the command;
    the text: its last lines."""

    def __init__(self, code: int, lines: Sequence[str]):
        super().__init__("".join(lines).strip() or f"the command ended with code {code}")
        self.code = code


class Interrupted(_Sentence, KeyboardInterrupt):
    """A verb that Python called, and that was interrupted: the same call goes on."""


class Transient(UserError):
    """A fault of storage or of a server that may go away by itself. It says nothing about the
    content of files."""

    code = CRASHED


_STORAGE = {
    errno.ENOSPC: ("the disk is full", "free some space and run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space and run the same command again"),
    errno.EROFS: ("the file system is read-only", "choose a writable directory"),
    errno.EACCES: ("permission denied", "choose a directory that you may write to"),
    errno.EPERM: ("operation not permitted", "choose a directory that you may write to"),
    errno.ENOTDIR: ("is a file, but a directory is needed", "move it or choose another path"),
    errno.EEXIST: ("is a file, but a directory is needed", "move it or choose another path"),
    errno.EISDIR: ("is a directory, but a file is needed", "move it or choose another path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
}
_AGAIN = "check the storage, then run the same command again"
# Faults that another try may not meet. Some are also faults of connections: they are the storage's
# if they come with the name of a file.
_SURELY_STORAGE = "EIO ESTALE EREMOTEIO"
_TRANSIENT = (
    "EAGAIN EINTR EBUSY EMFILE ENFILE ENOMEM ENOLCK EDEADLK ENXIO ENODEV EPROTO ECOMM ENOLINK "
    "ETIMEDOUT ENOTCONN ESHUTDOWN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET ENONET "
    "ECONNRESET ECONNABORTED ECONNREFUSED"
)


def storage_error(error: OSError) -> UserError | None:
    """Return the UserError for a failure of the storage, or None for any other OSError. It is a
    Transient if another try may succeed."""
    where = str(error.filename or "storage")
    if error.errno in _STORAGE:
        return UserError(where, *_STORAGE[error.errno])
    name = errno.errorcode.get(error.errno or 0, "none")
    if name in _SURELY_STORAGE.split() or (name in _TRANSIENT.split() and error.filename):
        return unknown_storage_error(error, where)
    return None


def unknown_storage_error(error: OSError, where: str) -> Transient:
    """Return the Transient for an OSError that came from storage; `where` if it names no file."""
    number = error.errno or 0
    if number == errno.EIO:
        problem = "the storage reports an I/O error"
    else:
        reason = error.strerror or (os.strerror(number) if number else str(error))
        problem = f"the storage fails ({reason})"
    return Transient(str(error.filename or where), problem, _AGAIN)


def retried(
    work: Callable[[], T], failed: Callable[[Transient, float], None] = lambda error, pause: None
) -> T:
    """Return the result of `work`, which is done again, after growing pauses, when the storage
    fails in a way that may go away by itself. failed: called with the error and the seconds of the
    pause before the next try. Raises the last Transient if all tries fail, every other error at
    once."""
    for pause in (*PAUSES, None):
        try:
            return work()
        except (OSError, Transient) as e:
            error = e if isinstance(e, Transient) else storage_error(e)
            if not isinstance(error, Transient):
                raise
            if pause is None:
                problem = f"{error.problem} (tried {len(PAUSES) + 1} times)"
                raise type(error)(error.where, problem, error.todo) from e
        failed(error, pause)
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


PREFIX = "FORESCALE_SECRET_"
_NAME = re.compile(r"\$(" + PREFIX + r"\w+)")
_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://\S+")
# Parameters of a query that give access: of S3, Google, Azure, Hugging Face, CloudFront and others.
_GIVES_ACCESS = (
    r"(sig(nature)?|[\w-]*(token|secret|passw|pwd|credential|auth|api.?key|access.?key)[\w-]*"
    r"|[\w-]*key|jwt|session|x-(amz|goog)-[\w-]+|policy|key-pair-id|hmac|code)"
)
_SIGNED = re.compile(_GIVES_ACCESS, re.IGNORECASE)
_IN_TEXT = re.compile(r"(?<=://)[^\s/'\"<>|]*@")
_ONLY_NAME = r"(?!\$" + PREFIX + r"\w+(?![\w&=%]))"
_QUERY = re.compile(r"(://[^\s?'\"<>|]*)\?" + _ONLY_NAME + r"[^\s'\"<>|]*[^\s'\"<>|.,;:)\]}]")
_PARAMETER = re.compile(r"([?&]" + _GIVES_ACCESS + r"=)[^\s&'\"]+", re.IGNORECASE)
_SHORTEST = 4  # characters of a value that is looked for in texts


def secret_in(text: str) -> str | None:
    """Return what is secret in a text that is an address ("a password", ...), else None."""
    if not _ADDRESS.fullmatch(text):
        return None
    protocol, _, rest = _NAME.sub("", text).partition("://")
    place, _, query = rest.partition("#")[0].partition("?")
    user, at, _ = place.partition("/")[0].rpartition("@")
    if at and (user.partition(":")[2] or (user and protocol in ("http", "https"))):
        return "a user or a password"
    for name, value in parse_qsl(query):
        if _SIGNED.fullmatch(name) and value:
            return f"a secret ({name})"
    return None


def masked(text: str) -> str:
    """Return text without the users, passwords and queries of the addresses in it, for messages and
    files; nor the values of the variables that addresses name, wherever they stand."""
    for name, value in os.environ.items():
        if name.startswith(PREFIX) and len(value) >= _SHORTEST:
            for text_form in (value, value.removeprefix("?"), with_secrets(f"${name}@")[:-1]):
                text = text.replace(text_form, f"${name}")
    # A name of a variable is no secret.
    text = _IN_TEXT.sub(lambda user: user[0] if _NAME.fullmatch(user[0][:-1]) else "", text)
    return _PARAMETER.sub(r"\1...", _QUERY.sub(r"\1?...", text))


def with_secrets(address: str) -> str:
    """Return an address with the variables that it names filled in, for a request alone. Raises
    LookupError with the name of one that is not set."""

    def value(match: re.Match[str]) -> str:
        if not (text := os.environ.get(match[1])):
            raise LookupError(match[1])
        if address[match.end() : match.end() + 1] == "@":
            user, mark, password = text.partition(":")
            return quote(user, safe="%") + mark + quote(password, safe="%")
        return text.removeprefix("?")

    return _NAME.sub(value, address)
