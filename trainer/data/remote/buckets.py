"""Files behind every other protocol that fsspec knows: s3, gs, and more.

Credentials and endpoints are the environment's (AWS_*, FSSPEC_S3_ENDPOINT_URL, ...), so that none
stands in a config. Listings are never remembered: a folder is what it is now.

Invariant: a call ends within its timeout where the file system is an asynchronous one (s3 and gs
are), and what the packages behind fsspec raise comes out as a Fault or a UserError.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from forescale.data.remote.transfer import MIB, Fault, Missing, Origin, without_secrets
from forescale.errors import UserError

_PIECE = 4 * MIB
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class FsspecOrigin(Origin):
    """A file at a protocol of fsspec."""

    _asked = False

    def pieces(self, start: int, stop: int | None, timeout: float, whole: bool) -> Iterator[bytes]:
        if not self._asked:  # no answer to a range says how long its file is
            self.ask(timeout)
        assert self.size is not None
        stop = self.size if stop is None else stop
        while start < stop:
            end = min(start + _PIECE, stop)
            piece = call(self.url, "cat_file", timeout, start=start, end=end)
            if len(piece) != end - start:
                self.ask(timeout)  # says so, if it is another file by now
                raise Fault(f"the answer ends {end - start - len(piece):,} bytes early")
            yield piece
            start = end

    def ask(self, timeout: float) -> None:
        info = call(self.url, "info", timeout)
        if info.get("type") == "directory":
            raise UserError(self.shown, "a folder where a file is needed", "check the address")
        if info.get("size") is None:
            what = "its store doesn't say how long it is"
            raise UserError(self.shown, what, "copy the file here")
        tag = next((info[k] for k in ("ETag", "etag", "generation") if info.get(k)), "")
        self.learn(info["size"], str(tag))
        self._asked = True


def call(url: str, method: str, timeout: float, **kwargs: Any) -> Any:
    """One method of the url's file system, on the url's path. Raises Fault or UserError."""
    import fsspec
    from fsspec.asyn import AsyncFileSystem, sync

    with _faults(url, timeout):
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
        if isinstance(fs, AsyncFileSystem):
            return sync(fs.loop, getattr(fs, f"_{method}"), path, timeout=timeout, **kwargs)
        return getattr(fs, method)(path, **kwargs)


@contextmanager
def _faults(url: str, timeout: float) -> Iterator[None]:
    shown, protocol = without_secrets(url), url.partition(":")[0]
    try:
        yield
    except ImportError as e:
        extra = _EXTRAS.get(protocol)
        todo = f"pip install 'forescale[{extra}]'" if extra else "install it"
        raise UserError(shown, f"a package for {protocol}:// isn't installed ({e})", todo) from e
    except FileNotFoundError as e:
        raise Missing(shown, "no such file", "check the address") from e
    except PermissionError as e:
        raise _refused(shown, e) from e
    except TimeoutError as e:
        raise Fault(f"no answer within {timeout:g} s") from e
    except (ValueError, TypeError, NotImplementedError, IsADirectoryError) as e:
        raise UserError(shown, f"can't be read ({e})", "check the address") from e
    except Exception as e:  # each package has its own, few of them OSErrors
        if "Credential" in type(e).__name__:
            raise _refused(shown, e) from e
        raise Fault(f"the transfer fails ({e or type(e).__name__})") from e


def _refused(shown: str, error: Exception) -> UserError:
    todo = "give your credentials to the environment, as the store's own tools take them"
    return UserError(shown, f"access is refused ({error})", todo)
