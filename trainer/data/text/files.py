"""Text files as a source of documents: finding the inputs, cutting them into units, reading a unit.

Invariant: the same files give the same units and the same documents in the same order, on any
machine; every file or line that gives no document is listed in the ReadingReport with its reason.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forescale.data.text.documents import Document, Intake, Policy, ReadingReport, Unit
from forescale.data.text.formats import TextKey, read_lines, read_plain
from forescale.data.text.inputs import InputFile, clean_suffixes, find_files, input_name, is_hub
from forescale.data.text.opening import bare, open_stream, printable, reading
from forescale.data.text.tables import hub_parts, load_hub, parquet_parts, read_hub, read_parquet
from forescale.data.text.tars import read_tar
from forescale.remote.transfer import is_url

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
        names = [input_name(str(path)) for path in paths]
        counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
        self.sources = [  # repeated names get a number
            f"{name} ({n})" if n > 1 else name for name, n in zip(names, counts, strict=True)
        ]
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
        intake = Intake(report, self.policy, self.text_key, self.suffixes)
        start, stop = unit.start, unit.stop
        for file in self._files[unit.first : unit.last]:
            name, where = file.name, file.where
            match file.kind:
                case "plain" | "html" | "bare":
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


def _joined(group: list[Unit]) -> Unit:
    first, others = group[0], len(group) - 1
    label = f"{first.label} and {others} more" if others else first.label
    size = sum(unit.size for unit in group)
    return Unit(label, size, first.source, first.first, group[-1].last)
