"""Write a dataset: token ids become tars with their indexes, which a manifest describes.

Invariant: the bytes of a shard depend only on its documents and their order; a tar contains nothing
about the machine, the time or the user.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from forescale.data.shard import CHUNK, FORMAT, MANIFEST, TOKENIZER
from forescale.data.tokenizer import Vocabulary
from forescale.ground.storage import FileEntry, HashingFile, write_file, write_json, write_table


def chunk_sums(payload: bytes | memoryview) -> str:
    """Return XXH3-64 of every CHUNK bytes of a payload, 16 hex digits each."""
    view = memoryview(payload)
    return "".join(
        xxhash.xxh3_64_hexdigest(view[at : at + CHUNK]) for at in range(0, len(view), CHUNK)
    )


class ShardWriter:
    """Writes one shard: `NAME.tar`, and `NAME.index.json` at the end.

    Members hold `member_tokens` each, the last one the rest; a longer document continues in the
    next member. Holds one member in memory.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        dtype: np.dtype,
        member_tokens: int,
        has_learned: bool = False,
    ):
        """dtype: of the stored ids, which are little-endian. has_learned: adds a column with a bit
        for each token, 1 if it counts in the loss."""
        self._directory, self._name = directory, name
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = HashingFile(directory / f"{name}.tar")
        self._members: list[dict[str, Any]] = []
        self._member = np.empty(member_tokens, self._dtype)
        self._learned = np.empty(member_tokens, np.bool_) if has_learned else None
        self._ends: list[int] = []  # token counts in the current member
        self._held = self._written = 0
        self.documents = 0

    @property
    def tokens(self) -> int:
        return self._written + self._held

    def add(self, document: np.ndarray, learned: np.ndarray | None = None) -> None:
        """Append a document's ids including its end-of-text token, shape (tokens,), not empty.
        learned: bool of the same shape, for a shard that has this column."""
        while (room := len(self._member) - self._held) < len(document):
            self._put(document[:room], learned)
            self._flush()
            document, learned = document[room:], None if learned is None else learned[room:]
        self._put(document, learned)
        self._ends.append(self._held)
        self.documents += 1

    def finish(self) -> tuple[dict[str, Any], dict[str, FileEntry]]:
        """Write the remaining tokens and flush both files to disk. Return the manifest's row, and
        the entries for the table of files."""
        if self._held:
            self._flush()
        end = 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(end + -(self._file.size + end) % tarfile.RECORDSIZE))
        tar = self._file.finish()
        index = {
            "file": f"{self._name}.tar",
            "dtype": self._dtype.name,
            "tokens": self._written,
            "documents": self.documents,
            "members": self._members,
        }
        row, entry = write_index(self._directory, self._name, index)
        row = {"file": f"{self._name}.tar", "size": tar.size, "sha256": tar.sha256, **row}
        return row, {f"{self._name}.tar": tar, row["index"]: entry}

    def _put(self, ids: np.ndarray, learned: np.ndarray | None) -> None:
        end = self._held + len(ids)
        self._member[self._held : end] = ids
        if self._learned is not None:
            assert learned is not None
            self._learned[self._held : end] = learned[: len(ids)]
        self._held = end

    def _flush(self) -> None:
        key = f"{len(self._members):06d}"
        member: dict[str, Any] = {"key": key, "first": self._written, "tokens": self._held}
        member["documents"] = len(self._ends)
        # Sorted names; plain readers group by the part before the first dot.
        member["doc"] = self._append_whole(f"{key}.doc.bin", np.array(self._ends, "<u4").tobytes())
        if self._learned is not None:
            bits = np.packbits(self._learned[: self._held]).tobytes()
            member["learned"] = self._append_whole(f"{key}.learned.bin", bits)
        tok = self._member[: self._held].tobytes()
        offset = self._append(f"{key}.tok.bin", tok)
        member["tok"] = {"offset": offset, "size": len(tok), "xxh3": chunk_sums(tok)}
        self._members.append(member)
        self._written += self._held
        self._held = 0
        self._ends.clear()

    def _append_whole(self, name: str, data: bytes) -> dict[str, Any]:
        """Append a file that has one checksum; return its part of the index."""
        digest = xxhash.xxh3_64_hexdigest(data)
        return {"offset": self._append(name, data), "size": len(data), "xxh3": digest}

    def _append(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0 and the names empty by default
        info.size = len(data)
        self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._file.size
        self._file.write(data)
        self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset


def write_index(
    directory: Path, name: str, index: dict[str, Any]
) -> tuple[dict[str, Any], FileEntry]:
    """Write NAME.index.json; return its part of the manifest's row and of the table of files."""
    path = directory / f"{name}.index.json"
    entry = write_file(path, (json.dumps(index, separators=(",", ":")) + "\n").encode())
    row = {"index": path.name, "index_size": entry.size, "index_sha256": entry.sha256}
    return {**row, "tokens": index["tokens"], "documents": index["documents"]}, entry


def write_manifest(
    stage: Path,
    entries: dict[str, FileEntry],
    vocabulary: Vocabulary,
    splits: dict[str, Any],
    corpus: str,
    request: dict[str, Any],
    report: dict[str, Any],
    baselines: dict[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Write the files that describe a whole dataset: tokenizer, manifest, table of files.

    entries: of the files that are in `stage`; splits: by name, totals and the rows of the shards;
    corpus: a sha256 of the documents; request: an equal one finds this dataset; baselines: sizes of
    compressed held-out text; dtype: of the ids, default the vocabulary's.
    """
    tokenizer = write_file(stage / TOKENIZER, vocabulary.raw)
    manifest = {
        "format": FORMAT,
        "dtype": dtype or vocabulary.dtype.name,
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": tokenizer.sha256,
            "vocab_size": vocabulary.size,
            "end_of_text": vocabulary.end,
        },
        "splits": splits,
        "corpus": {
            "sha256": corpus,
            "documents": sum(split["documents"] for split in splits.values()),
        },
        "build": request,
        "report": report,
        "baselines": baselines,
    }
    entries = {**entries, TOKENIZER: tokenizer, MANIFEST: write_json(stage / MANIFEST, manifest)}
    write_table(stage, entries)
