"""Shards, written: tokens and document ends go in, tars with their indexes come out.

Invariant: the bytes depend on the documents and their order alone; nothing of the machine, the time
or the user gets into a tar.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from trainer.durable import FileEntry, HashingFile, write_file


class SplitWriter:
    """Writes one split as `NAME-000000.tar`, ... and their indexes into a directory.

    A shard closes after the first document that fills `shard_tokens`, so that documents are never
    cut between shards; its members hold `member_tokens` each, the last one the rest.
    """

    def __init__(
        self, directory: Path, name: str, dtype: np.dtype, shard_tokens: int, member_tokens: int
    ):
        self._directory, self._name, self._dtype = directory, name, np.dtype(dtype)
        self._shard_tokens, self._member_tokens = shard_tokens, member_tokens
        self.rows: list[dict[str, Any]] = []  # the manifest's rows, one a shard
        self.files: dict[str, FileEntry] = {}
        self._tar: _Tar | None = None
        self._reset()

    def _reset(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._ends: list[int] = []  # in tokens of the current member
        self._held = 0

    def add(self, document: np.ndarray) -> None:
        """Append a document's ids, its end-of-text token included, shape (tokens,)."""
        if self._tar is None:
            name = f"{self._name}-{len(self.rows):06d}.tar"
            self._tar = _Tar(self._directory / name, self._dtype)
        while self._held + len(document) > self._member_tokens:
            cut = self._member_tokens - self._held
            self._pieces.append(document[:cut])
            self._held += cut
            self._flush()
            document = document[cut:]
        self._pieces.append(document)
        self._held += len(document)
        self._ends.append(self._held)
        if self._tar.tokens + self._held >= self._shard_tokens:
            self._close()

    def finish(self) -> None:
        if self._tar is not None:
            self._close()

    def totals(self) -> dict[str, int]:
        return {key: sum(row[key] for row in self.rows) for key in ("tokens", "documents")}

    def _flush(self) -> None:
        assert self._tar is not None
        tokens = np.concatenate(self._pieces).astype(self._dtype.newbyteorder("<"), copy=False)
        self._tar.add(tokens, np.array(self._ends, "<u4"))
        self._reset()

    def _close(self) -> None:
        assert self._tar is not None
        if self._held:
            self._flush()
        row, entries = self._tar.finish()
        self.rows.append(row)
        self.files.update(entries)
        self._tar = None


class _Tar:
    """One tar that is being written: USTAR, no times, no owners, sorted names."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype = path, dtype
        self._file = HashingFile(path)
        self._members: list[dict[str, Any]] = []
        self.tokens = self._documents = 0

    def add(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        key = f"{len(self._members):06d}"
        member = {
            "key": key,
            "first": self.tokens,
            "tokens": len(tokens),
            "documents": len(ends),
            "doc": self._append(f"{key}.doc.bin", ends.tobytes()),
            "tok": self._append(f"{key}.tok.bin", tokens.tobytes()),
        }
        self._members.append(member)
        self.tokens += len(tokens)
        self._documents += len(ends)

    def _append(self, name: str, data: bytes) -> dict[str, Any]:
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0 and the names empty by default
        info.size = len(data)
        self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._file.size
        self._file.write(data)
        self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return {"offset": offset, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def finish(self) -> tuple[dict[str, Any], dict[str, FileEntry]]:
        end = 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(end + -(self._file.size + end) % tarfile.RECORDSIZE))
        tar = self._file.finish()
        index_path = self._path.with_suffix(".index.json")
        index = {
            "tar": self._path.name,
            "dtype": self._dtype.name,
            "tokens": self.tokens,
            "documents": self._documents,
            "members": self._members,
        }
        entry = write_file(index_path, (json.dumps(index, indent=1) + "\n").encode())
        row = {
            "tar": self._path.name,
            "size": tar.size,
            "sha256": tar.sha256,
            "index": index_path.name,
            "index_size": entry.size,
            "index_sha256": entry.sha256,
            "tokens": self.tokens,
            "documents": self._documents,
        }
        return row, {self._path.name: tar, index_path.name: entry}
