"""Text files as a source of documents: finding the inputs, cutting them into units, reading a unit.

Invariant: the same files give the same units and the same documents in the same order, on any
machine; every file or line that gives no document is listed in the ReadingReport with its reason.
"""

import errno
import glob
import hashlib
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

from forescale.data.text.documents import Document, Intake, Policy, ReadingReport, Unit
from forescale.data.text.formats import TextKey, read_lines, read_plain
from forescale.data.text.opening import (
    COMPRESSED,
    HUB,
    KNOWN,
    Total,
    bare,
    clean,
    is_text,
    kind_of,
    open_raw,
    open_stream,
    printable,
    reading,
)
from forescale.data.text.tables import hub_parts, load_hub, parquet_parts, read_hub, read_parquet
from forescale.data.text.tars import read_tar
from forescale.data.text.where import Where
from forescale.ground.errors import UserError
from forescale.remote.transfer import is_url

_UNITS = 64  # number of units for small inputs
_LEAST, _MOST = 1 << 20, 16 << 20  # bytes of a unit
_MAGIC = "*?["
_MOST_MATCHES = 1_000_000


@dataclass(frozen=True)
class InputFile:
    """One file of an input.

    name: the same on every machine; where: path or address to open; size: in bytes; kind: as of
    `kind_of`, or table; source: index of its input.
    """

    name: str
    where: str
    size: int
    kind: str
    source: int


class Files:
    """Documents of files, folders, globs, URLs and Hugging Face data sets, in the order given.

        .txt .md .rst ... one document per file (all suffixes: opening.PLAIN)
        .html .htm        one document per file, its text without the markup
        no suffix         one document per file, if its content is text
        .jsonl            one document per line, text in field `text_key` ("meta.text" is nested)
        .parquet          one document per row, text in column `text_key`
        .tar              a webdataset's members: the same, .json, and the lines of .jsonl
        hf://NAME:SPLIT   one document per row, see `load_hub`

    All except .parquet may be compressed (.gz, .zst). Folders are read recursively in sorted order.
    Hidden files, files with other suffixes, and files without a suffix that hold no text are left
    out and reported; the policy decides about faulty, blank and long text. Raises UserError for an
    input that doesn't exist, can't be read, is truncated or damaged, or contains no text under the
    key.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        text_key: str = "text",
        policy: Policy | None = None,
        unit_bytes: int | None = None,
        suffixes: Sequence[str] = (),
        url_key: str = "",
        where: Mapping[str, Any] = MappingProxyType({}),
    ):
        """unit_bytes: approximate; suffixes: further ones of plain text; url_key, where: see
        Intake."""
        self.url_key, self.where = url_key, Where(where)
        self.text_key, self.policy = text_key, policy or Policy()
        self.suffixes = clean_suffixes(suffixes)
        self.policy.check()
        self._skipped = ReadingReport()
        self._files: list[InputFile] = []
        self._tables: dict[str, Any] = {}
        self._units: list[Unit] = []
        for index, path in enumerate(map(str, paths)):
            if is_hub(path):
                self._tables[path] = load_hub(path)
                self._files.append(InputFile(input_name(path), path, 0, "table", index))
            else:
                self._files += find_files(path, index, self._skipped, self.suffixes)
        self.sources, counts = list[str](), Counter[str]()
        for name in (input_name(str(path)) for path in paths):
            counts[name] += 1  # repeated names get a number
            self.sources.append(f"{name} ({counts[name]})" if counts[name] > 1 else name)
        held = sum(file.size for file in self._files)
        held += sum(table.data.nbytes for table in self._tables.values())
        self._unit_bytes = unit_bytes or min(max(held // _UNITS, _LEAST), _MOST)

    def describe(self) -> dict[str, Any]:
        """Return the request, sizes and a hash of the file names; see DocumentSource."""
        extra: dict[str, Any] = {"suffixes": sorted(self.suffixes)} if self.suffixes else {}
        extra |= {"where": self.where.rules} if self.where.rules else {}
        listing = hashlib.sha256()  # changes if a file is added, removed, renamed or resized
        for file in self._files:
            listing.update(f"{file.name}\0{file.size}\n".encode())
        return {
            "kind": "files",
            "names": self.sources,
            **extra,
            "text_key": self.text_key,
            "policy": asdict(self.policy),
            "files": len(self._files),
            "bytes": sum(file.size for file in self._files),
            "rows": sum(len(table) for table in self._tables.values()),
            "listing": listing.hexdigest(),
        }

    def state(self) -> Iterator[tuple[str, str]]:
        """Yield names with modification times or fingerprints; empty for remote files."""
        for file in self._files:
            version = ""
            if file.kind == "table":
                version = str(getattr(self._tables[file.where], "_fingerprint", ""))
            elif not is_url(file.where):
                with reading(file.where):
                    version = str(os.stat(file.where).st_mtime_ns)
            yield file.name, version

    def units(self) -> list[Unit]:
        """Return large .jsonl files and tables in parts, other files whole, small files of one
        input grouped.

        The first call opens every .parquet file to read its row groups.
        """
        if not self._units:
            self._units = list(self._cut())
        return list(self._units)

    def read(self, unit: Unit, report: ReadingReport) -> Iterator[Document]:
        if unit.first == 0 and unit.start == 0:
            report.merge(self._skipped)
        intake = Intake(report, self.policy, self.text_key, self.suffixes, self.url_key, self.where)
        start, stop = unit.start, unit.stop
        for file in self._files[unit.first : unit.last]:
            name, where = file.name, file.where
            match file.kind:
                case "plain" | "html" | "bare":
                    if not intake.reads(name, lambda key: None):  # it has no fields
                        continue
                    with open_stream(name, where) as f:
                        yield from read_plain(intake, name, where, f, file.kind)
                case "lines":
                    text_key = TextKey(self.text_key)
                    with open_stream(name, where, max(0, start - 1)) as f:
                        yield from read_lines(intake, name, where, f, text_key, start, stop or None)
                    if start == 0:  # a later part alone can't be judged
                        text_key.check(printable(where), "line")
                        if not text_key.rows and not stop:
                            yield from intake.documents(name, b"")
                case "parquet":
                    yield from read_parquet(intake, name, where, start, stop)
                case "tar":
                    yield from read_tar(intake, name, where)
                case "table":
                    yield from read_hub(intake, name, self._tables[where], start, stop)

    def _cut(self) -> Iterator[Unit]:
        group: list[Unit] = []
        for index, file in enumerate(self._files):
            parts = list(self._parts(file))
            size = parts[0][2] if parts else 0
            is_full = sum(unit.size for unit in group) + size > self._unit_bytes
            if group and (len(parts) > 1 or group[0].source != file.source or is_full):
                yield _joined(group)
                group = []
            if len(parts) <= 1:
                group.append(Unit(file.name, size, file.source, index, index + 1))
                continue
            for number, (start, stop, size) in enumerate(parts, 1):
                label = f"{file.name} (part {number} of {len(parts)})"
                yield Unit(label, size, file.source, index, index + 1, start, stop)
        if group:
            yield _joined(group)

    def _parts(self, file: InputFile) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, bytes) of the parts of a file; a single part is the whole file."""
        if file.kind == "parquet":
            yield from parquet_parts(file.where, self.text_key, self._unit_bytes)
        elif file.kind == "table":
            table = self._tables[file.where]
            yield from hub_parts(file.where, table, self.text_key, self._unit_bytes)
        elif file.kind == "lines" and bare(file.name) == file.name.lower():
            for start in range(0, file.size, self._unit_bytes):
                stop = min(start + self._unit_bytes, file.size)
                yield start, stop, stop - start
        else:
            yield 0, 0, file.size


def _joined(group: list[Unit]) -> Unit:
    first, others = group[0], len(group) - 1
    label = f"{first.label} and {others} more" if others else first.label
    size = sum(unit.size for unit in group)
    return Unit(label, size, first.source, first.first, group[-1].last)


def clean_suffixes(suffixes: Sequence[str]) -> tuple[str, ...]:
    """Return suffixes in lower case and with their dot. Raises UserError for an invalid one."""
    cleaned = tuple(f".{suffix.strip().lower().lstrip('.')}" for suffix in suffixes)
    for raw, suffix in zip(suffixes, cleaned, strict=True):
        if not re.fullmatch(r"(\.[\w+-]+)+", suffix):
            raise UserError("suffixes", f"{raw!r} isn't a suffix", "write such as [.log, .nfo]")
        if suffix in (*COMPRESSED, ".parquet", ".tar", ".jsonl"):
            problem = f"{raw!r} has its own meaning and can't be plain text"
            raise UserError("suffixes", problem, "leave it out")
    return cleaned


def is_hub(path: str) -> bool:
    """Return True for a data set to load, False for files of the hub (hf://datasets/NAME/FILE)."""
    return path.startswith(HUB) and not path.startswith(f"{HUB}datasets/")


def input_name(path: str) -> str:
    """Return an input's name for reports: the last part of its path, or the data set's name."""
    if is_hub(path):
        name, colon, split = path.removeprefix(HUB).partition(":")
        return (Path(name).name if Path(name).expanduser().is_dir() else name) + colon + split
    if is_url(path):
        return PurePosixPath(_path_of(path)).name or urlsplit(path).netloc
    return clean(Path(path).name or Path(path).resolve().name)


def find_files(
    path: str, source: int, skipped: ReadingReport, suffixes: Sequence[str] = ()
) -> list[InputFile]:
    """Return all files of an input, sorted by name. Raises UserError if there is none to read.
    suffixes: further ones of plain text."""
    if not path.strip():
        todo = "give a file, a folder, a glob or an address"
        raise UserError("input", "one of the inputs is empty", todo)
    if not is_url(path):
        path = str(Path(path).expanduser())
    files = []
    with reading(path):
        listed = list(_remote(path, skipped) if is_url(path) else _local(path, skipped))
    for name, where, size in listed:
        if kind := kind_of(name, suffixes):
            if kind == "bare" and where == path:  # the one file of the input
                with open_stream(name, where) as stream:
                    if not is_text(stream):
                        problem = "has no suffix, and its content isn't text"
                        raise UserError(printable(where), problem, f"expected {KNOWN}")
            if size is not None and not is_url(where):
                Total(where).add(size)  # a hole is as endless as a device
            if size is None:  # a web server's list doesn't give it
                with open_raw(where) as f:
                    size = f.seek(0, io.SEEK_END)
            files.append(InputFile(name, where, size, kind, source))
        elif where == path:
            problem, todo = "its suffix isn't a known kind of text", f"expected {KNOWN}"
            if path.lower().endswith(".json"):
                problem = "a .json file isn't a list of documents"
                todo = f"convert it to lines: jq -c '.[]' {printable(path)} > rows.jsonl"
            raise UserError(printable(path), problem, todo)
        else:
            skipped.add("other suffix", name)
    if not files:
        raise UserError(printable(path), "holds no text file", f"expected {KNOWN}")
    return sorted(files, key=lambda file: (file.name, file.where))


def _local(path: str, skipped: ReadingReport) -> Iterator[tuple[str, str, int]]:
    if os.path.isdir(path):
        yield from _walk(Path(path), input_name(path), skipped)
    elif os.path.lexists(path):
        if not stat.S_ISREG((status := os.stat(path)).st_mode):
            raise UserError(path, "isn't a regular file", "give a file or a folder")
        yield input_name(path), path, status.st_size
    elif any(c in path for c in _MAGIC) and (matches := matching(path)):
        root = _fixed_part(path)
        for match in map(Path, sorted(matches)):
            name = clean(match.relative_to(root).as_posix())
            if not match.is_dir():
                yield from _regular(match, name, skipped)
            elif "**" not in path:  # "**" already lists the contents of folders
                yield from _walk(match, name, skipped)
    else:
        raise UserError(path, "no such file or folder", "check the path")


def matching(pattern: str) -> list[str]:
    """Return the paths that match a glob. Raises UserError if they hardly end."""
    matches = list(islice(glob.iglob(pattern, recursive=True), _MOST_MATCHES + 1))
    if len(matches) > _MOST_MATCHES:  # ** follows links: two of a folder to itself never end
        problem = f"matches more than {_MOST_MATCHES:,} paths"
        raise UserError(pattern, problem, "name folders, whose linked folders aren't followed")
    return matches


def _fixed_part(pattern: str) -> str:
    """Return the folder that contains all matches of a glob."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in _MAGIC))
    return str(Path(*parts[:fixed]))


def _walk(root: Path, label: str, skipped: ReadingReport) -> Iterator[tuple[str, str, int]]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would silently skip a folder that it can't read

    for folder, subfolders, files in os.walk(root, onerror=fail):
        subfolders.sort()
        for entry in sorted(subfolders + files):
            path = Path(folder, entry)
            name = clean(f"{label}/{path.relative_to(root).as_posix()}")
            if entry.startswith("."):
                skipped.add("hidden", name)
            elif path.is_dir():
                if path.is_symlink():
                    skipped.add("linked folder", name)
            else:
                yield from _regular(path, name, skipped)
        subfolders[:] = [entry for entry in subfolders if not entry.startswith(".")]


def _regular(path: Path, name: str, skipped: ReadingReport) -> Iterator[tuple[str, str, int]]:
    """Yield a regular file, or nothing. Opening a pipe would block forever."""
    try:
        status = path.stat()
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        skipped.add("broken link", name)
        return
    if stat.S_ISREG(status.st_mode):
        yield name, str(path), status.st_size
    else:
        skipped.add("no regular file", name)


def _remote(url: str, skipped: ReadingReport) -> Iterator[tuple[str, str, int | None]]:
    from forescale.remote.listing import list_files

    listed = list_files(url)
    path = _path_of(url)
    if [_path_of(where) for where, _ in listed] == [path]:
        yield input_name(url), url, listed[0][1]
        return
    is_glob = any(c in path for c in _MAGIC)
    root = _fixed_part(path) if is_glob else path
    for where, size in listed:
        name = PurePosixPath(_path_of(where)).relative_to(root).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        name = name if is_glob else f"{input_name(url)}/{name}"
        if hidden:
            skipped.add("hidden", name)
        else:
            yield name, where, size


def _path_of(url: str) -> str:
    """Return the path in an address: with the bucket as a folder, without a query."""
    scheme, _, rest = url.partition("://")
    return unquote(urlsplit(url).path) if scheme in ("http", "https") else f"/{rest.strip('/')}"
