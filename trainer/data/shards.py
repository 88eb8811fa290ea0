"""A dataset on disk, read: manifest, index beside every tar, tokens verified before they are used.

    manifest.json               what the dataset holds and how it was made
    files.json                  size and sha256 of every file, the manifest too (trainer.durable)
    tokenizer.json
    train-000000.tar            plain USTAR; webdataset.WebDataset reads it unaided
      000000.tok.bin            little-endian uint16, or uint32 above 65,536 entries
      000000.doc.bin            uint32 ends of the documents that end in this member, exclusive,
                                counted in tokens from the member's first
    train-000000.index.json     offset, size and sha256 of every member, cumulative tokens
    validation-000000.tar ...

Invariant: no token of a member is handed out before the member's sha256 has been compared with the
index's, and the index's with the manifest's, in this process. A shard is one sequence of tokens;
members are only how it lies in the tar.
"""

import hashlib
import json
import os
from bisect import bisect_right
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from trainer.data.tokenizer import load_tokenizer, token_bytes
from trainer.durable import TABLE, hash_file, read_json, read_table
from trainer.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
_OPEN = 64  # shards of a split that are kept open at a time
_RESTORE = "restore it from a copy, or build the dataset again"


class Member(NamedTuple):
    """One tok.bin in a tar, with its doc.bin; offsets and sizes in bytes, the rest in tokens."""

    key: str
    first: int
    tokens: int
    documents: int
    tok: dict[str, Any]  # offset, size, sha256
    doc: dict[str, Any]


class Dataset:
    """A dataset that was built by `trainer.data.build`. Opening it reads the manifest alone.

    Raises UserError where the path holds no dataset, or a damaged manifest.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / MANIFEST).is_file():
            what = f"not a dataset (no {MANIFEST})" if self.path.is_dir() else "no such dataset"
            raise UserError(str(path), what, "make one with `forescale shards`")
        self._table = read_table(self.path)
        self._verify(MANIFEST)
        self.manifest: dict[str, Any] = read_json(self.path / MANIFEST)
        if (version := self.manifest["format"]) != FORMAT:
            raise UserError(
                str(path), f"format {version} is unknown to this version", "install a newer one"
            )

    def _verify(self, name: str) -> None:
        path = self.path / name
        if name not in self._table:
            raise UserError(str(path), f"not listed in {TABLE}", _RESTORE)
        if not path.is_file():
            raise UserError(str(path), "missing", _RESTORE)
        if hash_file(path) != self._table[name]:
            raise UserError(str(path), f"damaged: its sha256 isn't the one in {TABLE}", _RESTORE)

    @cached_property
    def identity(self) -> str:
        """sha256 over all that decides which tokens come: shards, dtype, tokenizer.

        Equal for equal data; baselines, reports and paths have no part in it.
        """
        m = self.manifest
        shards = {
            name: [(s["tokens"], s["sha256"]) for s in split["shards"]]
            for name, split in m["splits"].items()
        }
        what = [m["format"], m["dtype"], m["tokenizer"]["sha256"], shards]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def corpus_hash(self) -> str:
        """sha256 over the ordered names and hashes of the documents that were kept."""
        return self.manifest["corpus"]["sha256"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def end_of_text(self) -> int:
        """The id that follows every document."""
        return self.manifest["tokenizer"]["end_of_text"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        self._verify(TOKENIZER)
        return load_tokenizer(self.path / TOKENIZER)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token id, int64 of shape (vocab_size,); special tokens 0."""
        return token_bytes(self.tokenizer, str(self.path / TOKENIZER))

    def split(self, name: str) -> "Split":
        if name not in self.manifest["splits"]:
            have = ", ".join(self.manifest["splits"])
            raise UserError(str(self.path), f"has no split {name!r}", f"it has {have}")
        return Split(self.path, name, self.manifest["splits"][name], self.manifest["dtype"])


class Split:
    """One split of a dataset: shards of tokens, read at any position.

    num_tokens (with one end-of-text a document), num_documents, num_bytes (UTF-8 of the documents),
    shard_tokens. Reading is safe from several threads.
    """

    def __init__(self, path: Path, name: str, manifest: dict[str, Any], dtype: str):
        self.name, self.dtype = name, np.dtype(dtype).newbyteorder("<")
        self.num_tokens: int = manifest["tokens"]
        self.num_documents: int = manifest["documents"]
        self.num_bytes: int = manifest["bytes"]
        self.shard_tokens: list[int] = [s["tokens"] for s in manifest["shards"]]
        self._path, self._rows = path, manifest["shards"]
        self._verified: set[tuple[int, int]] = set()
        self.shard = lru_cache(_OPEN)(self._open)  # an evicted shard closes with its last reader

    def _open(self, shard: int) -> "Shard":
        return Shard(self._path, self._rows[shard], self.dtype)

    def read(self, shard: int, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of a shard, in the dtype of the dataset, shape (length,).

        Raises UserError, naming tar and member, where they can't be read or are damaged.
        """
        opened = self.shard(shard)
        if start < 0 or length < 0 or start + length > opened.num_tokens:
            raise ValueError(f"[{start}, {start + length}) of {opened.num_tokens} tokens")
        tokens = np.empty(length, self.dtype)
        filled, at = 0, opened.find(start)
        while filled < length:
            member = opened.members[at]
            if (shard, at) not in self._verified:
                opened.verify(at)
                self._verified.add((shard, at))
            skip = start + filled - member.first
            part = tokens[filled : filled + member.tokens - skip]
            opened.fill(part, member, skip)
            filled += len(part)
            at += 1
        return tokens


class Shard:
    """One tar, open, with its index: where the members lie and what they must hash to."""

    def __init__(self, directory: Path, row: dict[str, Any], dtype: np.dtype):
        self.path, self.dtype, self.num_tokens = directory / row["tar"], dtype, row["tokens"]
        index = directory / row["index"]
        try:
            raw = index.read_bytes()
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115
            size = os.fstat(self._file.fileno()).st_size
        except FileNotFoundError as e:
            raise UserError(e.filename, "missing from the dataset", _RESTORE) from None
        if hashlib.sha256(raw).hexdigest() != row["index_sha256"]:
            raise UserError(str(index), "damaged: its sha256 isn't the manifest's", _RESTORE)
        if size != row["size"]:
            what = f"{size:,} bytes where the manifest says {row['size']:,}"
            raise UserError(str(self.path), what, _RESTORE)
        self.members = [Member(**m) for m in json.loads(raw)["members"]]
        self._firsts = [m.first for m in self.members]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def find(self, token: int) -> int:
        return bisect_right(self._firsts, token) - 1

    def payload(self, member: Member, kind: str) -> bytearray:
        """The whole of a member's `tok` or `doc` file, verified. Raises UserError."""
        where = getattr(member, kind)
        data = bytearray(where["size"])
        self._pread(memoryview(data), where["offset"], f"{member.key}.{kind}.bin")
        if hashlib.sha256(data).hexdigest() != where["sha256"]:
            what = f"member {member.key}.{kind}.bin is damaged: its sha256 isn't the index's"
            raise UserError(str(self.path), what, _RESTORE)
        return data

    def verify(self, at: int) -> None:
        self.payload(self.members[at], "tok")

    def fill(self, tokens: np.ndarray, member: Member, skip: int) -> None:
        """Read a member's tokens from `skip` on into an array of the shard's dtype."""
        offset = member.tok["offset"] + skip * self.dtype.itemsize
        self._pread(memoryview(tokens.view(np.uint8).data), offset, f"{member.key}.tok.bin")

    def _pread(self, into: memoryview, offset: int, name: str) -> None:
        # Not mmap: a fault of the storage would end the process (SIGBUS) without a sentence.
        while into.nbytes:
            try:
                count = os.preadv(self._file.fileno(), [into], offset)
            except OSError as e:
                what = f"member {name} can't be read ({e.strerror})"
                raise UserError(str(self.path), what, "check the storage, or restore it") from e
            if not count:
                raise UserError(str(self.path), f"is cut off in member {name}", _RESTORE)
            into, offset = into[count:], offset + count
