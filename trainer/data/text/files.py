"""Text out of files: what the inputs hold, how it is cut into units, how a unit is read.

Invariant: the same files give the same units and the same documents in the same order, on any
machine; and every file or line that gives no document stands in the Report, with its reason.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forescale.data.remote.transfer import is_url
from forescale.data.text.documents import Document, Policy, Report, Source, Unit, decoded
from forescale.data.text.inputs import InputFile, find_files, input_name, is_hub
from forescale.data.text.lines import TextKey, lines_between, read_lines
from forescale.data.text.opening import bare, open_stream, reading, shown
from forescale.data.text.tables import (
    hub_parts,
    load_hub,
    parquet_parts,
    read_hub,
    read_parquet,
)
from forescale.data.text.tars import read_tar

__all__ = ["Document", "Files", "Policy", "Report", "Source", "Unit", "decoded"]

_UNITS, _LEAST, _MOST = 64, 1 << 20, 16 << 20  # units that small inputs are cut into; their bytes


class Files:
    """Documents of files, folders, globs, URLs and Hugging Face data sets, in the order given.

    .txt .md .py      a document each
    .jsonl            a document a line, the text under `text_key` ("meta.text" looks inside)
    .parquet          a document a row, the text in the column `text_key`
    .tar              a webdataset's members: .txt .md .py, .json, and the lines of .jsonl
    hf://NAME:SPLIT   a document a row, see `load_hub`

    All but .parquet may be compressed (.gz, .zst). Folders are walked whole in sorted order, hidden
    names and other suffixes left out and reported; what happens to faulty, blank and long text is
    the policy's. Raises UserError for an input that isn't there, may not be read, is cut off or
    damaged, holds nothing that is text, or nothing under the key.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        text_key: str = "text",
        policy: Policy | None = None,
        unit_bytes: int | None = None,
    ):
        self.text_key, self.policy = text_key, policy or Policy()
        self.policy.check()
        self._skipped = Report()
        self._files: list[InputFile] = []
        self._tables: dict[str, Any] = {}
        self._units: list[Unit] = []
        for index, path in enumerate(map(str, paths)):
            if is_hub(path):
                self._tables[path] = load_hub(path)
                self._files.append(InputFile(input_name(path), path, 0, "table", index))
            else:
                self._files += find_files(path, index, self._skipped)
        self.sources = _distinct([input_name(str(path)) for path in paths])
        held = sum(file.size for file in self._files)
        held += sum(table.data.nbytes for table in self._tables.values())
        self._unit_bytes = unit_bytes or min(max(held // _UNITS, _LEAST), _MOST)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "files",
            "names": self.sources,
            "text_key": self.text_key,
            "policy": asdict(self.policy),
            "files": len(self._files),
            "bytes": sum(file.size for file in self._files),
            "rows": sum(len(table) for table in self._tables.values()),
            "listing": self._listing(),
        }

    def _listing(self) -> str:
        """sha256 of the names and sizes: a file that came, went, was renamed or has grown shows."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.name}\0{file.size}\n".encode())
        return digest.hexdigest()

    def state(self) -> Iterator[tuple[str, str]]:
        """Names with times of change or fingerprints; of remote files nothing is known."""
        for file in self._files:
            yield file.name, self._version(file)

    def _version(self, file: InputFile) -> str:
        if file.kind == "table":
            return str(getattr(self._tables[file.where], "_fingerprint", ""))
        if is_url(file.where):
            return ""
        with reading(file.where):
            return str(os.stat(file.where).st_mtime_ns)

    def units(self) -> list[Unit]:
        """Big .jsonl files and tables in parts, other files whole, small ones of an input grouped.

        The first call looks into every .parquet file for its row groups.
        """
        if not self._units:
            self._units = list(self._cut())
        return list(self._units)

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        if unit.first == 0 and unit.start == 0:
            report.merge(self._skipped)
        for file in self._files[unit.first : unit.last]:
            yield from self._read(file, unit.start, unit.stop, report)

    def documents(self, report: Report) -> Iterator[Document]:
        """All documents, in plan order."""
        for unit in self.units():
            yield from self.read(unit, report)

    def _read(self, file: InputFile, start: int, stop: int, report: Report) -> Iterator[Document]:
        name, where, key, policy = file.name, file.where, self.text_key, self.policy
        match file.kind:
            case "plain":
                with open_stream(name, where) as f:
                    yield from decoded(name, f.read(), report, policy)
            case "lines":
                yield from self._read_lines(file, start, stop, report)
            case "parquet":
                yield from read_parquet(name, where, start, stop, key, report, policy)
            case "tar":
                yield from read_tar(name, where, key, report, policy)
            case "table":
                table = self._tables[where]
                yield from read_hub(name, table, start, stop, key, report, policy)

    def _read_lines(
        self, file: InputFile, start: int, stop: int, report: Report
    ) -> Iterator[Document]:
        text_key = TextKey(self.text_key)
        with open_stream(file.name, file.where, max(0, start - 1)) as f:
            lines = lines_between(f, start, stop or None)
            yield from read_lines(file.name, lines, text_key, report, self.policy)
        if start == 0:  # a later part alone says nothing about the file
            text_key.check(shown(file.where), "line")
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
        """(start, stop, size in bytes) of the parts of a file; a single one is the whole file."""
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
    """Whole files that follow each other, as one unit."""
    if not group:
        return []
    first, more = group[0], len(group) - 1
    label = f"{first.label} and {more} more" if more else first.label
    size = sum(unit.size for unit in group)
    return [Unit(label, size, first.source, first.first, group[-1].last)]


def _distinct(names: list[str]) -> list[str]:
    """Names of inputs, those that were had before with a number."""
    had = Counter[str]()
    distinct = []
    for name in names:
        had[name] += 1
        distinct.append(f"{name} ({had[name]})" if had[name] > 1 else name)
    return distinct
