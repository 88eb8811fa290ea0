"""Atomic, durable files and directories: stage, hash, fsync, rename; and the table of file hashes.

Datasets and checkpoints are directories published the same way: everything is written to a stage
directory beside the final one, hashed while written, fsynced; the table of files goes in last; one
rename gives the directory its name. So a name never stands for partial content, and the content
can be verified byte for byte at any later time.
"""

import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir, mkstemp
from typing import Any

from platformdirs import user_cache_path

from forescale.ground.errors import Transient, UserError, retried, shortened, storage_error
from forescale.ground.foreign import open_regular, parse_json, read_bytes
from forescale.ground.typed import RESTORE, Count, T, typed

TABLE = "files.json"
CHECKSUM = "file_sha256"  # the key under which a JSON file carries its own checksum
_BLOCK = 1 << 22
_LARGEST = 1 << 30  # bytes of JSON: an early state.json of 1,024 ranks has 55 MB
_LARGEST_CACHED = 1 << 28  # bytes of a file that one command leaves for the next
_MOST_UNHASHED = 1 << 30  # bytes by which hashing in its own thread may lag behind writing


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file."""

    size: Count
    sha256: str


class HashingFile:
    """A new file that is hashed while it is written; `finish` makes it durable. beside: hash in a
    thread of its own while writing and fsync go on; the written buffers must then not change until
    `finish`."""

    def __init__(self, path: Path, beside: bool = False):
        self.path = Path(path)
        self._file = open(self.path, "wb")  # noqa: SIM115 - closed in finish
        self._hash = hashlib.sha256()
        self._beside = ThreadPoolExecutor(1, "hash") if beside else None
        self._unhashed: deque[tuple[Future, int]] = deque()  # and the offset of each end
        self._hashed = 0
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        end = self.size + memoryview(data).nbytes
        if self._beside is None:
            self._hash.update(data)
        else:
            # The disk is slower: the earlier it gets everything, the more hashing is hidden.
            self._wait_for_hash(end - _MOST_UNHASHED)
            self._unhashed.append((self._beside.submit(self._hash.update, data), end))
        with naming(self.path):
            self._file.write(data)
        self.size = end
        return self.size

    def finish(self) -> FileEntry:
        """Fsync and close the file; returns its size and hash."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._wait_for_hash(self.size)
        return FileEntry(self.size, self._hash.hexdigest())

    def _wait_for_hash(self, end: int) -> None:
        while self._unhashed and self._hashed < end:
            done, self._hashed = self._unhashed.popleft()
            done.result()

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *exc) -> None:
        if self._beside is not None:
            self._beside.shutdown(wait=True, cancel_futures=True)
        # Data left in the buffer by a failed write would fail again and hide the first error.
        with suppress(OSError):
            self._file.close()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError in the block; errors of open files have none."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


def path_of(value: Any) -> Path:
    """Return the path that a caller of a Python function named. Raises UserError if it is none."""
    if not isinstance(value, str | os.PathLike) or "\0" in os.fspath(value):
        raise UserError(
            shortened(repr(value), 100), "is not a path", "give a str or a pathlib.Path"
        )
    try:
        return Path(value).expanduser()
    except RuntimeError as e:  # of pathlib, for ~nobody
        raise UserError(
            str(value), "begins with ~, but no user has this name", "write it in full"
        ) from e


def fsync_path(path: Path) -> None:
    """Make a written file durable, or the names in a directory: a rename is durable only then."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes | Iterable[bytes]) -> FileEntry:
    """Replace `path` by `data` or its blocks, atomically and durably. Raises UserError if it is no
    file: root would replace /dev/null, too."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(str(path), "is not a regular file", "choose another path")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with HashingFile(temporary) as f:
            for block in [data] if isinstance(data, bytes) else data:
                f.write(block)
            entry = f.finish()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
    return entry


def make_folder(path: Path) -> None:
    """Make a folder of outputs and its parents. Raises UserError if it takes no files, as /proc."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError as e:
        if storage_error(e):  # which says more
            raise
        raise UserError(str(path), f"takes no files ({e.strerror})", "choose another place") from e


def write_output(path: Path, data: bytes) -> None:
    """Write a file that a command names, and make its folder. Raises UserError if that can't be."""
    if path.is_dir():
        raise UserError(str(path), "is a directory", f"name a file, such as {path / 'page.html'}")
    try:
        make_folder(path.parent)
        write_file(path, data)
    except OSError as e:
        if storage_error(e):  # which says more
            raise
        raise UserError(str(path), f"can't be written ({e.strerror})", "choose another file") from e


def write_json(path: Path, value: Any, compact: bool = False) -> FileEntry:
    """Replace `path` by `value` as JSON. Keys keep their order: equal values give equal bytes.
    compact: write one line, which takes a third of the time and blocks other threads for less."""
    form: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 1}
    return write_file(path, (json.dumps(value, **form) + "\n").encode())


def write_checked_json(path: Path, value: dict[str, Any]) -> FileEntry:
    """Replace `path` by a JSON object that carries its own checksum, which `read_json` verifies and
    takes out again: in any state that it has, the file and its checksum belong together."""
    return write_file(path, _checked(value))


def _checked(value: dict[str, Any]) -> bytes:
    """The only bytes that the file of `value` can have."""
    digest = hashlib.sha256(json.dumps(value, indent=1).encode()).hexdigest()
    return (json.dumps({CHECKSUM: digest, **value}, indent=1) + "\n").encode()


def has_checksum(path: Path) -> bool:
    """Return True if a readable JSON file carries its own checksum."""
    value = _loaded(path)[1]
    return isinstance(value, dict) and CHECKSUM in value


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises UserError if it is missing, unreadable, not JSON,
    or not what its own checksum says."""
    raw, value = _loaded(path)
    if isinstance(value, dict) and CHECKSUM in value:
        del value[CHECKSUM]
        if raw != _checked(value):
            problem = "was changed since it was written (its checksum differs)"
            raise UserError(str(path), problem, "restore it from a copy")
    return value


def read_typed(kind: type[T], path: Path, todo: str = RESTORE) -> T:
    """Return the content of a JSON file as a dataclass or TypedDict. Raises UserError as
    `read_json` does, and if a value has another type."""
    return typed(kind, read_json(path), str(path), todo)


def _loaded(path: Path) -> tuple[bytes, Any]:
    raw = read_bytes(path, _LARGEST)
    return raw, parse_json(raw, path)


def write_table(directory: Path, entries: dict[str, FileEntry]) -> None:
    """Write the table of files; it is the last file written to a stage directory."""
    table = {name: vars(entry) for name, entry in sorted(entries.items())}
    write_json(Path(directory) / TABLE, table)


def read_table(directory: Path) -> dict[str, FileEntry]:
    """Return the table of files. Raises UserError if it is missing, damaged or names files outside
    the directory."""
    path = Path(directory) / TABLE
    table = read_typed(dict[str, FileEntry], path, "restore it or rebuild")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in table):
        raise UserError(str(path), "names a file outside its directory", "restore it or rebuild")
    return table


def blocks_of(path: Path, size: int | None = None, afresh: bool = False) -> Iterator[bytes]:
    """Yield a file, or its first `size` bytes, in blocks. afresh: as in `hash_file`."""
    left = size
    with naming(path), open_regular(path) as f:
        if afresh and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := f.read(_BLOCK if left is None else min(_BLOCK, left)):
            left = None if left is None else left - len(block)
            yield block


def hash_file(
    path: Path,
    tick: Callable[[int], None] = lambda n: None,
    afresh: bool = False,
    size: int | None = None,
) -> FileEntry:
    """Return size and sha256 of a file. tick: called with the bytes of every block read. afresh:
    read from the storage instead of the page cache, if the system supports that. size: of its first
    bytes alone."""
    digest, read = hashlib.sha256(), 0
    for block in blocks_of(path, size, afresh):
        digest.update(block)
        read += len(block)
        tick(len(block))
    return FileEntry(read, digest.hexdigest())


def check_table(
    directory: Path,
    tick: Callable[[int], None] = lambda n: None,
    *,
    part: tuple[int, int] = (0, 1),
    only: str | None = None,
    afresh: bool = False,
) -> list[str]:
    """Compare a published directory with its table; return one sentence per fault. part (i, n):
    verify every n-th file starting at the i-th, largest first, so that n ranks share the work
    evenly; only: verify this file alone; afresh: see `hash_file`."""
    directory, (first, parts) = Path(directory), part
    try:
        table = read_table(directory)
    except UserError as e:
        return [str(e)]
    if only is not None and only not in table:
        return [f"{directory / TABLE}: doesn't list {only}"]
    chosen = [item for item in _ordered(table)[first::parts] if only in (None, item[0])]
    return check_files(directory, chosen, tick, afresh)


def shares_of(directory: Path, parts: int) -> list[list[tuple[str, dict[str, Any]]]]:
    """Return the files that each of so many ranks verifies, with the fields of their entries.
    Raises UserError as `read_table`."""
    ordered = [(name, vars(entry)) for name, entry in _ordered(read_table(directory))]
    return [ordered[i::parts] for i in range(parts)]


def _ordered(table: dict[str, FileEntry]) -> list[tuple[str, FileEntry]]:
    return sorted(table.items(), key=lambda item: (-item[1].size, item[0]))


def check_files(
    directory: Path,
    entries: Iterable[tuple[str, FileEntry]],
    tick: Callable[[int], None] = lambda n: None,
    afresh: bool = False,
) -> list[str]:
    """Compare files of a directory with their entries; return one sentence per fault."""

    def fault(item: tuple[str, FileEntry]) -> str | None:
        name, want = item
        path = directory / name
        try:
            if not path.is_file():
                return f"{path}: missing"
            if (size := path.stat().st_size) != want.size:
                return f"{path}: {size:,} bytes instead of the {want.size:,} in the table"
            if retried(lambda: hash_file(path, tick, afresh)).sha256 != want.sha256:
                return f"{path}: its sha256 differs from the table's (damaged)"
        except Transient as e:
            return f"{path}: {e.problem}"
        except OSError as e:
            return f"{path}: can't be read ({e.strerror})"
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [f for f in pool.map(fault, entries) if f]


def publish(stage: Path, final: Path) -> None:
    """Rename a finished stage directory to its final name. Raises OSError if the name is taken."""
    stage, final = Path(stage), Path(final)
    fsync_path(stage)
    os.rename(stage, final)
    fsync_path(final.parent)


@contextmanager
def staged(final: Path, tag: str = "new") -> Iterator[Path]:
    """Yield an empty stage directory for `final`; publish it after the block, remove it on error.
    Each caller has a stage of its own: of several that make the same directory at once, one
    publishes, and the others get the OSError of `publish`. What processes of this host that live no
    more left behind, with the same tag, is removed first."""
    final = Path(final)
    begin, end = f".{final.name}.{tag}.{socket.gethostname()}.", ".stage"
    stage = final.with_name(f"{begin}{os.getpid()}.{secrets.token_hex(3)}{end}")
    make_folder(final.parent)
    for old in final.parent.iterdir():
        if old.name.startswith(begin) and old.name.endswith(end):
            process = old.name[len(begin) :].partition(".")[0]
            if process.isdecimal() and not _lives(int(process)):
                shutil.rmtree(old, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        publish(stage, final)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no possible number
        return True
    return True


def cache_directory(cache: str | Path | None = None) -> Path:
    """Return the given directory, or $FORESCALE_CACHE, or the user's own as the system has it:
    $XDG_CACHE_HOME/forescale or ~/.cache/forescale on Linux."""
    chosen = cache or os.environ.get("FORESCALE_CACHE") or user_cache_path("forescale")
    return Path(chosen).expanduser()


def memory_folder(key: str) -> Path:
    """Return the path of this user's folder of a name in the memory of the node; on a machine
    without /dev/shm among the temporary files."""
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return _memory() / f"forescale-{os.getuid()}-{digest}"


def _memory() -> Path:
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK | os.X_OK) else Path(gettempdir())


def make_private(path: Path) -> Path:
    """Make a folder that is closed to others, unless it exists. Raises UserError if it belongs to
    another user, OSError if it can't be made."""
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise UserError(str(path), "belongs to another user", "remove it")
    return path


def read_private(path: Path) -> bytes:
    """Return the content of a small file in the cache. Raises OSError if `expect_private` does."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as f:
        expect_private(os.fstat(f.fileno()))
        return f.read(_LARGEST_CACHED)


def expect_private(status: os.stat_result) -> None:
    """Raise OSError unless it is of a file of this user's own that is closed to all others."""
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not stat.S_ISREG(status.st_mode):
        raise PermissionError("of another user, open to others, or no file")


def write_private(path: Path, data: bytes) -> None:
    """Replace a small file in the cache by one that is closed to others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = mkstemp(dir=path.parent)
    try:
        with open(fd, "wb") as f:
            f.write(data)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
