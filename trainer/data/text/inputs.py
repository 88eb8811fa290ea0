"""Expand an input to files: of a folder, a glob, a path or an address, in a fixed order.

Invariant: names and their order don't depend on the location of the input; names are relative to
it, with forward slashes. Files of a folder or a glob that are left out are listed in the
ReadingReport.
"""

import glob
import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from forescale.data.text.documents import ReadingReport
from forescale.data.text.opening import (
    COMPRESSED,
    bare,
    is_text,
    open_raw,
    open_stream,
    printable,
    reading,
)
from forescale.ground.errors import UserError
from forescale.remote.transfer import is_url

HUB = "hf://"
_TEXT = (
    ".txt .text .md .markdown .rst .tex .org .adoc .asciidoc .textile "
    ".py .pyi .c .h .cc .cpp .cxx .hh .hpp .cu .cs .go .hs .java .jl .js .jsx .kt .lua .ml .php "
    ".pl .pm .r .rb .rs .scala .sh .sql .swift .ts .tsx"
)
PLAIN = tuple(_TEXT.split())
HTML = (".html", ".htm", ".xhtml")
KNOWN = (
    ".txt .md .rst .tex .html .jsonl and source code (also with .gz or .zst), .parquet, .tar, or "
    "text without a suffix; suffixes=[.xyz] adds others"
)
_MAGIC = "*?["


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


def kind_of(name: str, suffixes: Sequence[str] = ()) -> str | None:
    """Return how a file is read, by its suffix: plain, html, lines, parquet, tar; bare if it has
    none, so that its content decides; None if the suffix isn't one of text.

    suffixes: further ones of plain text.
    """
    stem = bare(name)
    if stem.endswith((*PLAIN, *suffixes)):
        return "plain"
    if stem.endswith(HTML):
        return "html"
    # C4 and Dolma call compressed lines .json.gz; a plain .json is mostly one object or an array.
    if stem.endswith(".jsonl") or (len(stem) < len(name) and stem.endswith(".json")):
        return "lines"
    if stem.endswith(".tar") or name.lower().endswith(".tgz"):
        return "tar"
    if name.lower().endswith(".parquet"):
        return "parquet"
    return None if PurePosixPath(stem).suffix else "bare"


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
    elif any(c in path for c in _MAGIC) and (matches := glob.glob(path, recursive=True)):
        root = _fixed_part(path)
        for match in map(Path, sorted(matches)):
            name = clean(match.relative_to(root).as_posix())
            if not match.is_dir():
                if (size := _regular(match, name, skipped)) is not None:
                    yield name, str(match), size
            elif "**" not in path:  # "**" already lists the contents of folders
                yield from _walk(match, name, skipped)
    else:
        raise UserError(path, "no such file or folder", "check the path")


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
            elif (size := _regular(path, name, skipped)) is not None:
                yield name, str(path), size
        subfolders[:] = [entry for entry in subfolders if not entry.startswith(".")]


def _regular(path: Path, name: str, skipped: ReadingReport) -> int | None:
    """Return the size of a regular file, or None. Opening a pipe would block forever."""
    try:
        status = path.stat()
    except FileNotFoundError:
        skipped.add("broken link", name)
        return None
    if not stat.S_ISREG(status.st_mode):
        skipped.add("no regular file", name)
        return None
    return status.st_size


def clean(name: str) -> str:
    """Return a file name as valid UTF-8: otherwise texts that contain it couldn't be written."""
    return os.fsencode(name).decode("utf-8", "replace")


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
