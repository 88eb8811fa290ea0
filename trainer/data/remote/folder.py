"""A folder that files are copied to and from: in a bucket, or in another directory.

Invariant: `put` returns only after the copy was read back and has the sha256 of what was sent. A
file is replaced as a whole, in a directory as at a store: a kill leaves the old or the new one.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from forescale.data.remote.buckets import FsspecOrigin, call, listed, upload
from forescale.data.remote.transfer import (
    PATIENCE,
    Missing,
    Patience,
    RetryableError,
    persist,
    receive,
)
from forescale.errors import masked
from forescale.storage import FileEntry, hash_file

_LONGEST = 3600.0  # seconds that sending one file may take


class Folder:
    """A folder at an address of fsspec (s3://, gs://, ...), or the path of a directory. It need not
    exist. Names of files are relative to it, with "/" between their parts."""

    def __init__(self, address: str, patience: Patience = PATIENCE):
        self._address, self._patience = address.rstrip("/"), patience
        self.where = masked(self._address)

    def is_at(self, path: Path) -> bool:
        """Return True if this is the directory at `path`."""
        return "://" not in self._address and Path(self._address).resolve() == path.resolve()

    def list(self) -> dict[str, int]:
        """Return the size in bytes of each file, by name. Raises UserError."""
        attempt = partial(listed, self._address, self._patience.seconds)
        try:
            return persist(self.where, self._patience, attempt)
        except Missing:
            return {}

    def has(self, name: str) -> bool:
        """Return True if there is a file of this name now. Raises UserError."""
        origin = FsspecOrigin(self._at(name))
        try:
            persist(self.where, self._patience, partial(origin.ask, self._patience.timeout))
        except Missing:
            return False
        return True

    def put(self, name: str, path: Path) -> FileEntry:
        """Copy a local file there; return size and sha256 of the copy, as read back.

        The file may grow meanwhile: then the copy is its beginning, at least as long as the file
        was. Raises UserError, also if the copy differs.
        """
        return persist(self.where, self._patience, partial(self._put, name, path))

    def _put(self, name: str, path: Path) -> FileEntry:
        least = path.stat().st_size
        upload(path, self._at(name), _LONGEST)
        digest, size = hashlib.sha256(), 0
        for piece in self.get(name):
            digest.update(piece)
            size += len(piece)
        copied = FileEntry(size, digest.hexdigest())
        if size < least or hash_file(path, size=size) != copied:
            raise RetryableError(f"the copy of {name} differs from the file")
        return copied

    def get(self, name: str) -> Iterator[bytes]:
        """Yield the content of a file. Raises UserError."""
        return receive(FsspecOrigin(self._at(name)), 0, None, self._patience)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there. Raises UserError."""
        self._remove(name, "rm_file")

    def remove_all(self, name: str) -> None:
        """Delete a folder with all its files, if it is there. Raises UserError."""
        self._remove(name, "rm", recursive=True)

    def _remove(self, name: str, method: str, **how: bool) -> None:
        attempt = partial(call, self._at(name), method, self._patience.seconds, **how)
        with suppress(Missing):
            persist(self.where, self._patience, attempt)

    def _at(self, name: str) -> str:
        return f"{self._address}/{name}"
