"""Files behind http and https: ranges read with requests, every answer checked before use.

requests is used instead of fsspec's http client: if a server ignores ranges, that client takes the
head of the file for the range; it never compares Content-Range or ETag, never retries, and waits
five minutes for a server that hangs.

Invariant: a byte is returned only if status and Content-Range confirm that it is the requested
byte, in a file of the size and version known so far.
"""

import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, IncompleteRead, RemoteDisconnected
from socket import gaierror
from typing import Any

from forescale.ground.errors import UserError
from forescale.remote.transfer import MIB, Missing, Origin, RetryableError, for_request

_WHOLE = 8 * MIB  # a file up to this size is read even if the server ignores ranges
_PIECE = 1 << 17
# One session per thread: requests doesn't guarantee that threads may share one.
_sessions = threading.local()


class HttpOrigin(Origin):
    """A file at a web server. Proxies, ~/.netrc and certificates are taken from the environment."""

    def pieces(self, start: int, stop: int | None, timeout: float, whole: bool) -> Iterator[bytes]:
        # A range for the whole file too: the answer contains the file's size, even if its body is
        # cut off.
        with self._get(f"bytes={start}-{'' if stop is None else stop - 1}", timeout) as answer:
            skip = self._judge(answer, start, whole)
            end = self.size if stop is None else stop
            left = None if end is None else end - start
            while left is None or left > 0:
                with _faults(self.where, timeout):
                    # One receive at a time, so that a very slow server is noticed.
                    piece = answer.raw.read1(_PIECE, decode_content=False)
                if not piece:
                    if left:
                        raise RetryableError(f"the answer is {left:,} bytes too short")
                    return
                skipped = min(skip, len(piece))
                skip -= skipped
                piece = piece[skipped:] if left is None else piece[skipped : skipped + left]
                if piece:
                    left = None if left is None else left - len(piece)
                    yield piece

    def ask(self, timeout: float) -> None:
        # Not HEAD: a signed address may allow GET alone.
        with self._get("bytes=0-0", timeout) as answer:
            self._judge(answer, 0, whole=True)

    def _get(self, spread: str, timeout: float) -> Any:
        if not hasattr(_sessions, "session"):
            import requests  # takes 0.1 s, which most commands don't need

            _sessions.session = requests.Session()
        # If the body were compressed in transit, ranges would count other bytes.
        headers = {"Range": spread, "Accept-Encoding": "identity", "User-Agent": "forescale"}
        url = for_request(self.url)
        with _faults(self.where, timeout):
            return _sessions.session.get(url, headers=headers, timeout=timeout, stream=True)

    def _judge(self, answer: Any, start: int, whole: bool) -> int:
        """Compare an answer with the request; return how many of its bytes to skip."""
        status, headers = answer.status_code, answer.headers
        tag = headers.get("ETag") or headers.get("Last-Modified") or ""
        spread = headers.get("Content-Range", "")
        if status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", spread)
            if not match or int(match[1]) != start:
                raise RetryableError(
                    f"requested the bytes from {start:,} on, the server sends {spread!r}"
                )
            self.learn(_number(match[2]), tag)
            return 0
        if status == 200:
            self.learn(_number(headers.get("Content-Length", "")), tag)
            if not whole and (self.size is None or self.size > _WHOLE):
                problem = "the server ignores ranges (it sends the whole file for a part of it)"
                todo = (
                    "use a server with ranges (nginx, caddy, S3), or copy the files to a local disk"
                )
                raise UserError(self.where, problem, todo)
            return start
        if status == 416:
            self.learn(_number(spread.removeprefix("bytes */")), tag)
            if self.size is not None and start >= self.size:
                return 0  # an empty file has no first byte
        problem = f"the server answers {status} {answer.reason or ''}".rstrip()
        if status >= 500 or status in (408, 425, 429):
            raise RetryableError(problem, _seconds(headers.get("Retry-After", "")))
        if status in (404, 410):
            raise Missing(self.where, f"doesn't exist ({problem})", "check the address")
        if status in (401, 403, 407):
            todo = "check the address and your access (user and password go into ~/.netrc)"
            raise UserError(self.where, f"access denied ({problem})", todo)
        raise UserError(self.where, problem, "check the address and the server")


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _seconds(after: str) -> float:
    """Return the seconds of a Retry-After, which is a number or a date; 0 for neither."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util.retry import Retry

    try:
        return Retry().parse_retry_after(after)
    except InvalidHeader:
        return 0.0


@contextmanager
def _faults(where: str, timeout: float) -> Iterator[None]:
    """Convert exceptions to a RetryableError, or a UserError if another try is useless."""
    import requests
    from urllib3.exceptions import (
        ConnectTimeoutError,
        HTTPError,
        NewConnectionError,
        ReadTimeoutError,
    )

    try:
        yield
    except (requests.RequestException, HTTPError, OSError, HTTPException) as e:
        causes = list(_causes(e))
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                problem = f"its certificate isn't trusted ({cause.verify_message})"
                todo = (
                    "check the address, or set REQUESTS_CA_BUNDLE to your authority's certificates"
                )
                raise UserError(where, problem, todo) from e
        if isinstance(e, requests.TooManyRedirects):
            raise UserError(where, "it redirects without end", "check the address") from e
        if isinstance(e, ValueError):  # no host, an invalid port, an unknown scheme
            raise UserError(where, f"isn't a valid address ({e})", "check the address") from e
        reasons = (
            (gaierror, "the name of the server can't be resolved"),
            (ConnectionRefusedError, "the server refuses the connection"),
            (RemoteDisconnected, "the server closes the connection without an answer"),
            (ConnectionError, "the connection was interrupted"),
            (ReadTimeoutError, f"the server sent nothing for {timeout:g} s"),
            (ConnectTimeoutError, f"no connection within {timeout:g} s"),
            (IncompleteRead, "the answer was cut off"),
            (HTTPException, "the answer isn't HTTP"),
        )
        # A ConnectTimeoutError by its class, whatever its cause.
        known = [cause for cause in causes if not isinstance(cause, NewConnectionError)]
        names = (words for kind, words in reasons if any(isinstance(c, kind) for c in known))
        raise RetryableError(next(names, "") or f"the transfer fails ({causes[-1]})") from e


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and all that it wraps, in arguments and reasons too (urllib3)."""
    todo, visited = [error], set()
    while todo:
        if id(e := todo.pop()) in visited:
            continue
        visited.add(id(e))
        yield e
        inner = (e.__cause__, e.__context__, getattr(e, "reason", None), *e.args)
        todo += [i for i in inner if isinstance(i, BaseException)]
