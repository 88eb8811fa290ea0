"""Documents out of files, and the account of everything that was left out.

Invariant: the same files give the same documents in the same order, on any machine; and every file
or line that gives no document stands in the Report, with its reason.
"""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import zstandard

from trainer.errors import UserError

PLAIN = (".txt", ".md", ".py")
LINES = (".jsonl",)
COMPRESSED = (".gz", ".zst")
_BLOCK = 1 << 20
_LISTED = 200  # names kept for each reason; the counts are always exact


@dataclass(frozen=True)
class Document:
    """One text: a name that is the same on every machine, and UTF-8 that is known to be valid."""

    name: str
    text: bytes


@dataclass
class Report:
    """What was left out and why: a count for every reason, and the first 200 names of each."""

    counts: dict[str, int] = field(default_factory=dict)
    listed: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.listed.setdefault(reason, [])
        if len(names) < _LISTED:
            names.append(name)

    def merge(self, other: "Report") -> None:
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            names = self.listed.setdefault(reason, [])
            names.extend(other.listed[reason][: _LISTED - len(names)])

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return {
            reason: {"count": count, "first": self.listed[reason]}
            for reason, count in sorted(self.counts.items())
        }


class Source(Protocol):
    """Where documents come from. Read several times over, so each pass must give the same."""

    def documents(self, report: Report) -> Iterator[Document]: ...

    def describe(self) -> dict[str, Any]:
        """What was asked for, as JSON without machine paths; it goes into the manifest."""
        ...


def decoded(name: str, text: bytes, report: Report) -> Iterator[Document]:
    """The document, or nothing and an entry in the report: the policy for faulty text."""
    if not text.strip():
        report.add("empty", name)
        return
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as e:
        report.add("undecodable", f"{name} (byte {e.start})")
        return
    yield Document(name, text)


class Files:
    """Documents of folders, globs and single files: .txt .md .py whole, .jsonl a line each.

    Any of them may be compressed (.gz, .zst). Folders are walked whole in sorted order, hidden
    names and other suffixes left out and reported. Text that isn't UTF-8, is empty, or a line
    without a string under `text_key` gives no document and stands in the report. Raises UserError
    for a path that isn't there, that holds nothing readable, a damaged compressed file, or a
    .jsonl file in which no line at all has the key.
    """

    def __init__(self, paths: Sequence[str | Path], text_key: str = "text"):
        self.text_key = text_key
        self.names = [Path(p).name or Path(p).resolve().name for p in paths]
        self._skipped = Report()
        self._files: list[tuple[str, Path]] = []
        for path in paths:
            found = list(self._expand(Path(path).expanduser()))
            if not found:
                known = " ".join(PLAIN + LINES)
                raise UserError(
                    str(path), "holds no text file", f"expected {known}, also with .gz or .zst"
                )
            self._files += found
        self._bytes = sum(path.stat().st_size for _, path in self._files)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "files",
            "names": self.names,
            "text_key": self.text_key,
            "files": len(self._files),
            "bytes": self._bytes,
        }

    def documents(self, report: Report) -> Iterator[Document]:
        report.merge(self._skipped)
        for name, path in self._files:
            if _kind(path) in LINES:
                yield from self._lines(name, path, report)
            else:
                yield from decoded(name, b"".join(_blocks(path)), report)

    def _lines(self, name: str, path: Path, report: Report) -> Iterator[Document]:
        keys: set[str] = set()
        count = found = 0
        for number, line in enumerate(_split_lines(_blocks(path)), 1):
            if not line.strip():
                continue
            count += 1
            where = f"{name}:{number}"
            try:
                row = json.loads(line)
                text = row.get(self.text_key) if isinstance(row, dict) else None
                raw = text.encode("utf-8") if isinstance(text, str) else None
            except UnicodeError:  # bytes that aren't UTF-8, or half a surrogate pair
                report.add("undecodable", where)
                continue
            except ValueError:
                report.add("malformed", where)
                continue
            if raw is None:
                keys.update(row if isinstance(row, dict) else ())
                report.add(f"no text under {self.text_key!r}", where)
            else:
                found += 1
                yield from decoded(where, raw, report)
        if count and not found:
            have = f"its lines have {', '.join(sorted(keys)[:8])}" if keys else "see its first line"
            raise UserError(
                str(path), f"no line has a text under {self.text_key!r}", f"name the key ({have})"
            )

    def _expand(self, path: Path) -> Iterator[tuple[str, Path]]:
        if path.is_dir():
            yield from self._walk(path)
        elif path.is_file():
            if _kind(path) is None:
                known = " ".join(PLAIN + LINES)
                raise UserError(
                    str(path), "its suffix says no kind of text", f"rename it to one of {known}"
                )
            yield path.name, path
        elif matches := sorted(glob.glob(str(path), recursive=True)):
            for match in map(Path, matches):
                if match.is_dir():
                    yield from self._walk(match)
                elif _kind(match):
                    yield match.name, match
                else:
                    self._skipped.add("other suffix", match.name)
        else:
            raise UserError(str(path), "no such file or folder", "check the path")

    def _walk(self, root: Path) -> Iterator[tuple[str, Path]]:
        found = []
        label = root.name or root.resolve().name
        for folder, subfolders, files in os.walk(root, onerror=_raise):
            for name in sorted(subfolders + files):
                path = Path(folder, name)
                relative = f"{label}/{path.relative_to(root).as_posix()}"
                if name.startswith("."):
                    self._skipped.add("hidden", relative)
                elif path.is_dir():
                    if path.is_symlink():
                        self._skipped.add("linked folder", relative)
                elif _kind(path):
                    found.append((relative, path))
                else:
                    self._skipped.add("other suffix", relative)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from sorted(found)


def _raise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that it may not read


def _kind(path: Path) -> str | None:
    """The suffix that says how a file is read, compression aside."""
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
    return path.suffix if path.suffix in PLAIN + LINES else None


def _split_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in blocks:
        first, *more = block.split(b"\n")
        rest.append(first)
        for line in more:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


def _blocks(path: Path) -> Iterator[bytes]:
    """The uncompressed bytes of a file. Raises UserError where its compression is damaged."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as f:
                while block := f.read(_BLOCK):
                    yield block
        else:
            with open(path, "rb") as f:
                yield from (
                    _unzstd(f) if path.suffix == ".zst" else iter(lambda: f.read(_BLOCK), b"")
                )
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
        raise UserError(
            str(path), f"cut off or damaged ({e})", "restore the file from its source"
        ) from e


def _unzstd(f) -> Iterator[bytes]:
    # zstandard's own stream reader ends without a word where a file is cut off: count the frames.
    frame = None
    while block := f.read(_BLOCK):
        while block:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame isn't whole")
