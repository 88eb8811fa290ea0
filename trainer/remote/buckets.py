"""Files and folders behind the protocols of fsspec except http: s3, gs, local paths, and more.

Credentials and endpoints come from the environment (AWS_*, FSSPEC_S3_ENDPOINT_URL, ...), or by a
name in the address (see errors.py), so that none is stored in a config. Listings are never cached:
a folder is listed as it is now.

Invariant: a call ends within its timeout if the file system is asynchronous (s3 and gs are), and
exceptions of the packages behind fsspec become a RetryableError or a UserError. `Folder.put`
returns only after the copy was read back and has the sha256 of what was sent. A file is replaced as
a whole, in a directory as in a bucket: a kill leaves the old or the new one.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from forescale.ground.errors import UserError, masked
from forescale.ground.foreign import SMALL
from forescale.ground.storage import FileEntry, blocks_of, fsync_path, hash_file, write_file
from forescale.remote.transfer import (
    MIB,
    PATIENCE,
    Missing,
    Origin,
    Patience,
    RetryableError,
    exists,
    for_request,
    persist,
    receive,
)

_PIECE = 4 * MIB
_LONGEST = 3600.0  # seconds that sending one file may take
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class FsspecOrigin(Origin):
    """A file at a protocol of fsspec."""

    _is_known = False

    def pieces(self, start: int, stop: int | None, timeout: float, whole: bool) -> Iterator[bytes]:
        if not self._is_known:  # answers to ranges don't contain the file's size
            self.ask(timeout)
        assert self.size is not None
        stop = self.size if stop is None else stop
        while start < stop:
            end = min(start + _PIECE, stop)
            piece = call(self.url, "cat_file", timeout, start=start, end=end)
            if len(piece) != end - start:
                self.ask(timeout)  # raises if the file has changed
                raise RetryableError(f"the answer is {end - start - len(piece):,} bytes too short")
            yield piece
            start = end

    def ask(self, timeout: float) -> None:
        info = call(self.url, "info", timeout)
        if info.get("type") == "directory":
            raise UserError(self.where, "is a folder, not a file", "check the address")
        if info.get("size") is None:
            problem = "its store doesn't report the file size"
            raise UserError(self.where, problem, "copy the file to a local disk")
        tag = next((info[k] for k in ("ETag", "etag", "generation") if info.get(k)), "")
        self.learn(info["size"], str(tag))
        self._is_known = True


class Folder:
    """A folder that files are copied to and from: an address of fsspec (s3://, gs://, ...), or the
    path of a directory. It need not exist. Names of files are relative to it, with "/" between
    their parts. Its methods raise UserError."""

    def __init__(self, address: str, patience: Patience = PATIENCE):
        self._address, self._patience = address.rstrip("/"), patience
        self.where = masked(self._address)

    def is_at(self, path: Path) -> bool:
        """Return True if this is the directory at `path`."""
        return "://" not in self._address and Path(self._address).resolve() == path.resolve()

    def list(self) -> dict[str, int]:
        """Return the size in bytes of each file, by name; none if there is no such folder."""

        def attempt() -> dict[str, int]:
            with _faults(self._address, self._patience.seconds) as (fs, path):
                entries = _called(fs, "find", self._patience.seconds, path, detail=True)
                top = path.rstrip("/") + "/"
                files = {p: info for p, info in entries.items() if info.get("type") == "file"}
                return {p.removeprefix(top): info["size"] for p, info in files.items()}

        with suppress(Missing):
            return persist(self.where, self._patience, attempt)
        return {}

    def has(self, name: str) -> bool:
        """Return True if there is a file of this name now."""
        return exists(FsspecOrigin(self._at(name)), self._patience)

    def put(self, name: str, path: Path) -> FileEntry:
        """Copy a local file there, in place of a whole file of this name; return size and sha256 of
        the copy, as read back.

        The file may grow meanwhile: then the copy is its beginning, at least as long as the file
        was. Raises UserError, also if the copy differs.
        """

        def attempt() -> FileEntry:
            least = path.stat().st_size
            with _faults(self._at(name), _LONGEST) as (fs, target):
                from fsspec.implementations.local import LocalFileSystem

                if not hasattr(fs, "loop"):  # of a disk: buckets have no folders
                    fs.makedirs(fs._parent(target), exist_ok=True)
                if isinstance(fs, LocalFileSystem):
                    write_file(Path(target), blocks_of(path))
                else:
                    _called(fs, "put_file", _LONGEST, str(path), target)
            digest, size = hashlib.sha256(), 0
            for piece in self.get(name):
                digest.update(piece)
                size += len(piece)
            copied = FileEntry(size, digest.hexdigest())
            if size < least or hash_file(path, size=size) != copied:
                raise RetryableError(f"the copy of {name} differs from the file")
            return copied

        return persist(self.where, self._patience, attempt)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file, durably, unless there is one of this name; return False if there is.
        Of several that create it at once one does: in a directory, and in a bucket of a store that
        knows conditional writes, as s3 and gs are."""

        def attempt() -> bool:
            with _faults(self._at(name), self._patience.seconds) as (fs, target):
                from fsspec.implementations.local import LocalFileSystem

                if isinstance(fs, LocalFileSystem):
                    return _linked(Path(target), data)
                if not hasattr(fs, "loop"):
                    fs.makedirs(fs._parent(target), exist_ok=True)
                try:
                    seconds = self._patience.seconds
                    _called(fs, "pipe_file", seconds, target, data, mode="create")
                except FileExistsError:
                    return False
                except OSError as e:  # of a store that doesn't name the condition that failed
                    if e.errno == errno.EINVAL and self.has(name):
                        return False
                    raise
                return True

        return persist(self.where, self._patience, attempt)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file; None if there is none."""
        content = b""
        with suppress(Missing):
            for piece in self.get(name):
                content += piece
                if len(content) > SMALL:
                    problem = f"has more than {SMALL:,} bytes"
                    raise UserError(masked(self._at(name)), problem, "restore the file")
            return content
        return None

    def get(self, name: str) -> Iterator[bytes]:
        """Yield the content of a file."""
        return receive(FsspecOrigin(self._at(name)), 0, None, self._patience)

    def remove(self, name: str, recursive: bool = False) -> None:
        """Delete a file, or a folder with all its files, if it is there."""
        method, options = ("rm", {"recursive": True}) if recursive else ("rm_file", {})
        attempt = partial(call, self._at(name), method, self._patience.seconds, **options)
        with suppress(Missing):
            persist(self.where, self._patience, attempt)

    def _at(self, name: str) -> str:
        return f"{self._address}/{name}"


def _linked(path: Path, data: bytes) -> bool:
    """Write a file whole under a name that is free; return False if it isn't."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), 0o644)  # others may be other users
        os.fsync(file.fileno())
        try:
            os.link(file.name, path)
        except FileExistsError:
            return False
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            problem = "is in a file system without hard links, by which a file is created once"
            raise UserError(str(path.parent), problem, "give another folder, or a bucket") from e
    fsync_path(path.parent)
    return True


def call(url: str, method: str, timeout: float, **options: Any) -> Any:
    """Call a method of an address's file system on its path. Raises RetryableError, UserError."""
    with _faults(url, timeout) as (fs, path):
        return _called(fs, method, timeout, path, **options)


def _called(fs: Any, method: str, timeout: float, *args: Any, **options: Any) -> Any:
    from fsspec.asyn import AsyncFileSystem, sync

    if isinstance(fs, AsyncFileSystem):
        return sync(fs.loop, getattr(fs, f"_{method}"), *args, timeout=timeout, **options)
    return getattr(fs, method)(*args, **options)


@contextmanager
def _faults(url: str, timeout: float) -> Iterator[tuple[Any, str]]:
    """Yield the file system of an address and the path in it; convert exceptions of its package."""
    where, protocol = masked(url), url.partition(":")[0]
    try:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        if "://" not in url:  # a path, in which fsspec would read :: as a chain, too
            yield LocalFileSystem(), url
        elif "::" in url:
            problem = "has :: in it, which stands for a chain of addresses"
            raise UserError(where, problem, "give an address without it")
        else:
            yield fsspec.url_to_fs(for_request(url), use_listings_cache=False)
    except UserError:
        raise
    except ImportError as e:
        extra = _EXTRAS.get(protocol)
        todo = f"pip install 'forescale[{extra}]'" if extra else "install it"
        raise UserError(where, f"the package for {protocol}:// isn't installed ({e})", todo) from e
    except FileNotFoundError as e:
        raise Missing(where, "doesn't exist", "check the address") from e
    except PermissionError as e:
        raise _refused(where, e) from e
    except TimeoutError as e:
        raise RetryableError(f"no answer within {timeout:g} s") from e
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as e:
        raise UserError(where, f"is no place for a file ({e.strerror})", "check the path") from e
    except (ValueError, TypeError, NotImplementedError) as e:
        raise UserError(where, f"can't be used ({e})", "check the address") from e
    except Exception as e:  # each package has its own exceptions, few are OSErrors
        if "Credential" in type(e).__name__:
            raise _refused(where, e) from e
        raise RetryableError(f"the transfer fails ({e or type(e).__name__})") from e


def _refused(where: str, error: Exception) -> UserError:
    todo = "set your credentials in the environment, as for the store's own tools"
    return UserError(where, f"access denied ({error})", todo)
