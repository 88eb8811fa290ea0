"""Text files as a source of documents: finding the inputs, cutting them into units, reading a unit.

Invariant: the same files give the same units and the same documents in the same order, on any
machine; every file or line that gives no document is listed in the ReadingReport with its reason.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forescale.data.text.documents import (
    Document,
    DocumentSource,
    Policy,
    ReadingReport,
    Unit,
    decoded,
)
from forescale.data.text.inputs import InputFile, clean_suffixes, find_files, input_name, is_hub
from forescale.data.text.lines import TextKey, lines_between, read_lines
from forescale.data.text.opening import Budget, bare, open_stream, printable, reading
from forescale.data.text.tables import hub_parts, load_hub, parquet_parts, read_hub, read_parquet
from forescale.data.text.tars import read_plain, read_tar
from forescale.remote.transfer import is_url

__all__ = ["Document", "DocumentSource", "Files", "Policy", "ReadingReport", "Unit", "decoded"]

_UNITS = 64  # number of units for small inputs
_LEAST, _MOST = 1 << 20, 16 << 20  # bytes of a unit


class Files:
    """Documents of files, folders, globs, URLs and Hugging Face data sets, in the order given.

        .txt .md .rst ... one document per file (all suffixes: inputs.PLAIN)
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
    ):
        """unit_bytes: approximate bytes per unit; default: from the size of the input. suffixes:
        further ones of plain text."""
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
        self.sources = _distinct([input_name(str(path)) for path in paths])
        held = sum(file.size for file in self._files)
        held += sum(table.data.nbytes for table in self._tables.values())
        self._unit_bytes = unit_bytes or min(max(held // _UNITS, _LEAST), _MOST)

    def describe(self) -> dict[str, Any]:
        """Return the request, sizes and a hash of the file names; see DocumentSource."""
        extra = {"suffixes": sorted(self.suffixes)} if self.suffixes else {}
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
        for file in self._files[unit.first : unit.last]:
            yield from self._read(file, unit.start, unit.stop, report)

    def _read(
        self, file: InputFile, start: int, stop: int, report: ReadingReport
    ) -> Iterator[Document]:
        name, where, key, policy = file.name, file.where, self.text_key, self.policy
        match file.kind:
            case "plain" | "html" | "bare":
                with open_stream(name, where) as f:
                    yield from read_plain(name, where, f, file.kind, report, policy)
            case "lines":
                yield from self._read_lines(file, start, stop, report)
            case "parquet":
                yield from read_parquet(name, where, start, stop, key, report, policy)
            case "tar":
                yield from read_tar(name, where, key, report, policy, self.suffixes)
            case "table":
                table = self._tables[where]
                yield from read_hub(name, table, start, stop, key, report, policy)

    def _read_lines(
        self, file: InputFile, start: int, stop: int, report: ReadingReport
    ) -> Iterator[Document]:
        text_key = TextKey(self.text_key)
        with open_stream(file.name, file.where, max(0, start - 1)) as f:
            budget = Budget.of_line(file.name, file.where, self.policy)
            lines = lines_between(f, budget, start, stop or None)
            yield from read_lines(file.name, lines, text_key, report, self.policy)
        if start == 0:  # a later part alone can't be judged
            text_key.check(printable(file.where), "line")
            if not text_key.rows and not stop:
                yield from decoded(file.name, b"", report, self.policy)

    def _cut(self) -> Iterator[Unit]:
        group: list[Unit] = []
        for index, file in enumerate(self._files):
            parts = list(self._parts(file))
            if len(parts) > 1:
                yield from _joined(group)
                group = []
                for number, (start, stop, size) in enumerate(parts, 1):
                    label = f"{file.name} (part {number} of {len(parts)})"
                    yield Unit(label, size, file.source, index, index + 1, start, stop)
                continue
            size = parts[0][2] if parts else 0
            whole = Unit(file.name, size, file.source, index, index + 1)
            held = sum(unit.size for unit in group)
            if group and (group[0].source != file.source or held + size > self._unit_bytes):
                yield from _joined(group)
                group = []
            group.append(whole)
        yield from _joined(group)

    def _parts(self, file: InputFile) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, size in bytes) of the parts of a file; a single part is the whole
        file."""
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


def _joined(group: list[Unit]) -> list[Unit]:
    if not group:
        return []
    first, others = group[0], len(group) - 1
    label = f"{first.label} and {others} more" if others else first.label
    size = sum(unit.size for unit in group)
    return [Unit(label, size, first.source, first.first, group[-1].last)]


def _distinct(names: list[str]) -> list[str]:
    """Return the names, repeated ones with a number appended."""
    had = Counter[str]()
    distinct = []
    for name in names:
        had[name] += 1
        distinct.append(f"{name} ({had[name]})" if had[name] > 1 else name)
    return distinct
