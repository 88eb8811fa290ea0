"""Inputs of a build at a server: list the files, and open each as a stream.

fsspec's http client could list folders too, but knows neither ~/.netrc nor retries, and would put
the secrets of an address into the names that it returns.

Invariant: a list is sorted and holds every file of a folder or glob once, or an error is raised; a
stream gives the bytes of one version of its file, or raises. Both retry after server errors.
"""

import io
import re
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from typing import BinaryIO
from urllib.parse import urljoin

from forescale.ground.errors import UserError, masked
from forescale.remote.buckets import call
from forescale.remote.store import origin_of
from forescale.remote.transfer import MIB, PATIENCE, Origin, Patience, is_url, persist, receive

_WINDOW = 4 * MIB  # bytes requested at a time after a seek


def list_files(url: str, patience: Patience = PATIENCE) -> list[tuple[str, int | None]]:
    """Return (address, size in bytes) of the files at `url`: a file, a folder or a glob.

    A folder is listed recursively. At a web server a folder is an address that ends in "/"; it can
    be listed if the server shows folders as pages of links, and sizes are None. Raises UserError,
    also if there is no file.
    """
    _expect_address(url)
    if url.startswith(("http://", "https://")):
        files = sorted(_web_files(url, patience))
    else:
        method = "glob" if re.search(r"[*?\[]", url) else "find"
        attempt = partial(call, url, method, patience.seconds, detail=True)
        entries = persist(masked(url), patience, attempt)
        protocol = url.partition("://")[0]
        files = sorted(
            (f"{protocol}://{path.removeprefix('/')}", info.get("size"))
            for path, info in entries.items()
            if info.get("type") == "file"
        )
    if not files:
        raise UserError(masked(url), "has no files", "check the address")
    return files


def open_input(url: str, patience: Patience = PATIENCE) -> BinaryIO:
    """Open a file for reading: as one stream, or, after a seek, in ranges.

    Raises UserError, also while reading. Size and version are requested at once, and hold for the
    whole stream.
    """
    _expect_address(url)
    origin = origin_of(url)
    persist(origin.where, patience, partial(origin.ask, patience.timeout))
    return io.BufferedReader(_Stream(origin, patience), MIB)


def _expect_address(url: str) -> None:
    if not is_url(url):
        raise UserError(url, "isn't an address", "give one such as https://... or s3://...")


class _Stream(io.RawIOBase):
    """A file at its origin, as a Python file object."""

    def __init__(self, origin: Origin, patience: Patience):
        self._origin, self._patience = origin, patience
        self._at, self._jumped = 0, False
        self._left = memoryview(b"")  # received but not read yet
        self._pieces: Iterator[bytes] = iter(())
        self._restart()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = self._origin.size
        while not self._left and (size is None or self._at < size):
            piece = next(self._pieces, None)
            if piece is None:
                if not self._jumped:
                    return 0
                self._restart()
            else:
                self._left = memoryview(piece)
        into = memoryview(buffer).cast("B")
        count = min(len(into), len(self._left))
        into[:count] = self._left[:count]
        self._left = self._left[count:]
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            if self._origin.size is None:
                problem = "its server doesn't report the file size"
                raise UserError(self._origin.where, problem, "copy it to a local disk")
            offset += self._origin.size
        elif whence == io.SEEK_CUR:
            offset += self._at
        if offset < 0:
            raise ValueError(f"seek to {offset}")
        if offset != self._at:
            self._at, self._jumped, self._left = offset, True, memoryview(b"")
            self._restart()
        return self._at

    def close(self) -> None:
        self._pieces, self._left = iter(()), memoryview(b"")  # ends the transfer
        super().close()

    def _restart(self) -> None:
        """Continue from the current position: all the rest, or one window after a seek.

        A server that ignores ranges would also send everything before the position, for every seek.
        """
        stop, whole = None, not self._jumped
        if self._jumped and self._origin.size is not None:
            stop = min(self._at + _WINDOW, self._origin.size)
        self._pieces = receive(self._origin, self._at, stop, self._patience, whole)


def _web_files(url: str, patience: Patience) -> set[tuple[str, int | None]]:
    from fsspec.utils import glob_translate

    magic = re.search(r"[*\[]", url)
    if magic is None and not url.endswith("/"):
        return {(url, None)}
    folder = url[: url.rindex("/", 0, magic.start()) + 1] if magic else url
    matches = re.compile(glob_translate(url) if magic else ".*", re.DOTALL).fullmatch
    deep = "/" in url[len(folder) :] or not magic
    files: set[tuple[str, int | None]] = set()
    visited, todo = {folder}, [folder]
    while todo:
        for link in _links(todo.pop(), patience):
            if not link.endswith("/") and matches(link):
                files.add((link, None))
            elif link.endswith("/") and deep and link not in visited:
                visited.add(link)
                todo.append(link)
    return files


def _links(folder: str, patience: Patience) -> Iterator[str]:
    """Yield the addresses inside a folder that its page links to."""
    page = b"".join(receive(origin_of(folder), 0, None, patience, whole=True))
    parser = _Anchors()
    parser.feed(page.decode("utf-8", "replace"))
    for target in parser.targets:
        link = urljoin(folder, target).partition("#")[0]
        if link.startswith(folder) and link != folder and "?" not in link:
            yield link


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for key, value in attrs if tag == "a" and key == "href" and value]
