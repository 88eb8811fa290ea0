"""Files behind all other protocols of fsspec: s3, gs, and more.

Credentials and endpoints come from the environment (AWS_*, FSSPEC_S3_ENDPOINT_URL, ...), or by a
name in the address (see errors.py), so that none is stored in a config. Listings are never
cached: a folder is listed as it is now.

Invariant: a call ends within its timeout if the file system is asynchronous (s3 and gs are), and
exceptions of the packages behind fsspec become a RetryableError or a UserError.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forescale.data.remote.transfer import MIB, Missing, Origin, RetryableError, for_request
from forescale.errors import UserError, masked
from forescale.storage import blocks_of, write_file

_PIECE = 4 * MIB
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class FsspecOrigin(Origin):
    """A file at a protocol of fsspec."""

    _asked = False

    def pieces(self, start: int, stop: int | None, timeout: float, whole: bool) -> Iterator[bytes]:
        """See Origin."""
        if not self._asked:  # answers to ranges don't contain the file's size
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
        """See Origin."""
        info = call(self.url, "info", timeout)
        if info.get("type") == "directory":
            raise UserError(self.shown, "is a folder, not a file", "check the address")
        if info.get("size") is None:
            problem = "its store doesn't report the file size"
            raise UserError(self.shown, problem, "copy the file to a local disk")
        tag = next((info[k] for k in ("ETag", "etag", "generation") if info.get(k)), "")
        self.learn(info["size"], str(tag))
        self._asked = True


def call(url: str, method: str, timeout: float, **kwargs: Any) -> Any:
    """Call one method of the URL's file system on the URL's path.

    Raises RetryableError or UserError.
    """
    with _faults(url, timeout):
        fs, path = _opened(url)
        return _called(fs, method, timeout, path, **kwargs)


def listed(url: str, timeout: float) -> dict[str, int]:
    """Return the size in bytes of each file below a folder, by its path in it. Raises like `call`;
    stores that know no folders answer {} where there is none."""
    with _faults(url, timeout):
        fs, path = _opened(url)
        found = _called(fs, "find", timeout, path, detail=True)
        top = path.rstrip("/") + "/"
        files = {p: info for p, info in found.items() if info.get("type") == "file"}
        return {p.removeprefix(top): info["size"] for p, info in files.items()}


def upload(file: Path, url: str, timeout: float) -> None:
    """Copy a local file to an address, of which it replaces the content, in a directory as at a
    store: all at once. Raises like `call`."""
    with _faults(url, timeout):
        from fsspec.implementations.local import LocalFileSystem

        fs, path = _opened(url)
        if not hasattr(fs, "loop"):  # of a disk: stores at servers have no folders
            fs.makedirs(fs._parent(path), exist_ok=True)
        if isinstance(fs, LocalFileSystem):
            write_file(Path(path), blocks_of(file))
        else:
            _called(fs, "put_file", timeout, str(file), path)


def _opened(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    if "://" not in url:  # a path, in which fsspec would read :: as a chain, too
        return LocalFileSystem(), url
    if "::" in url:
        problem = "has :: in it, which stands for a chain of addresses"
        raise UserError(masked(url), problem, "give an address without it")
    return fsspec.url_to_fs(for_request(url), use_listings_cache=False)


def _called(fs: Any, method: str, timeout: float, *args: Any, **kwargs: Any) -> Any:
    from fsspec.asyn import AsyncFileSystem, sync

    if isinstance(fs, AsyncFileSystem):
        return sync(fs.loop, getattr(fs, f"_{method}"), *args, timeout=timeout, **kwargs)
    return getattr(fs, method)(*args, **kwargs)


@contextmanager
def _faults(url: str, timeout: float) -> Iterator[None]:
    shown, protocol = masked(url), url.partition(":")[0]
    try:
        yield
    except UserError:
        raise
    except ImportError as e:
        extra = _EXTRAS.get(protocol)
        todo = f"pip install 'forescale[{extra}]'" if extra else "install it"
        raise UserError(shown, f"the package for {protocol}:// isn't installed ({e})", todo) from e
    except FileNotFoundError as e:
        raise Missing(shown, "doesn't exist", "check the address") from e
    except PermissionError as e:
        raise _refused(shown, e) from e
    except TimeoutError as e:
        raise RetryableError(f"no answer within {timeout:g} s") from e
    except (IsADirectoryError, NotADirectoryError) as e:
        raise UserError(shown, f"is no place for a file ({e.strerror})", "check the path") from e
    except (ValueError, TypeError, NotImplementedError) as e:
        raise UserError(shown, f"can't be used ({e})", "check the address") from e
    except Exception as e:  # each package has its own exceptions, few are OSErrors
        if "Credential" in type(e).__name__:
            raise _refused(shown, e) from e
        raise RetryableError(f"the transfer fails ({e or type(e).__name__})") from e


def _refused(shown: str, error: Exception) -> UserError:
    todo = "set your credentials in the environment, as for the store's own tools"
    return UserError(shown, f"access denied ({error})", todo)
