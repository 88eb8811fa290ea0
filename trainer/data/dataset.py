"""A dataset, read: a manifest, shards of tokens, and an index beside every shard.

    manifest.json               what the dataset holds and how it was made
    files.json                  size and sha256 of every file, the manifest too (forescale.storage)
    tokenizer.json
    train-000000.tar            plain USTAR; webdataset.WebDataset reads it unaided
      000000.tok.bin            little-endian uint16, or uint32 above 65,536 entries
      000000.doc.bin            uint32 ends of the documents that end in this member, exclusive,
                                counted in tokens from the member's first
    train-000000.index.json     offset, size and checksums of every member, cumulative tokens
    validation-000000.tar ...

A corpus that is used in place has no tars: the manifest names its files where they lie, and the
document ends are in train-000000.doc.bin beside the index.

Invariant: what is handed out is what was written. The table of files vouches for the manifest, that
for each index, and the index for every chunk of tokens (forescale.data.shard).
"""

import hashlib
import json
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from forescale.data.remote.store import CACHE_BYTES, Store, open_store
from forescale.data.shard import FORMAT, MANIFEST, RESTORE, TOKENIZER, Damaged, Shard
from forescale.data.tokenizer import token_bytes
from forescale.errors import UserError
from forescale.storage import TABLE

__all__ = ["FORMAT", "MANIFEST", "TOKENIZER", "Damaged", "Dataset", "Split"]

_OPEN = 64  # shards of a split that are kept open at a time


class Dataset:
    """A dataset in a directory, or behind a URL. Opening it reads the manifest alone.

    cache: where parts of a remote one are kept on this machine. Raises UserError where the path
    holds no dataset, or a damaged manifest.
    """

    def __init__(self, path: str | Path, cache: Path | None = None, cache_bytes: int = CACHE_BYTES):
        self._store = open_store(path, cache, cache_bytes)
        self.where = self._store.where  # as messages name it
        self.path = Path(self.where)  # of a local one
        if not self._store.exists(MANIFEST):
            there = "://" not in self.where and self.path.is_dir()
            what = f"not a dataset (no {MANIFEST})" if there else "no such dataset"
            raise UserError(self.where, what, "make one with `forescale shards`")
        self._table = self._json(TABLE, self._store.read(TABLE))
        self.manifest: dict[str, Any] = self._json(MANIFEST, self._verified(MANIFEST))
        version = self.manifest.get("format")
        if version != FORMAT:
            older = isinstance(version, int) and version < FORMAT
            todo = "build it again" if older else "install a newer version"
            raise UserError(self.where, f"its format {version} is unknown to this version", todo)

    def _json(self, name: str, raw: bytes) -> dict[str, Any]:
        try:
            value = json.loads(raw)
        except ValueError as e:
            where = f"{self.where}/{name}"
            raise UserError(where, f"damaged: not valid JSON ({e})", RESTORE) from e
        if not isinstance(value, dict):
            raise UserError(f"{self.where}/{name}", "damaged: not a JSON object", RESTORE)
        return value

    def _verified(self, name: str) -> bytes:
        """A small file, whole, as the table of files has it."""
        where, entry = f"{self.where}/{name}", self._table.get(name)
        if not isinstance(entry, dict):
            raise UserError(where, f"not listed in {TABLE}", RESTORE)
        raw = self._store.read(name)
        if len(raw) != entry.get("size") or _sha256(raw) != entry.get("sha256"):
            raise UserError(where, f"damaged: its sha256 isn't the one in {TABLE}", RESTORE)
        return raw

    @cached_property
    def identity(self) -> str:
        """sha256 over all that decides which tokens come: shards, dtype, tokenizer.

        Equal for equal data; baselines, reports and paths have no part in it.
        """
        m = self.manifest
        shards = {
            name: [(s["tokens"], s["sha256"] or s["content"]) for s in split["shards"]]
            for name, split in m["splits"].items()
        }
        what = [m["format"], m["dtype"], m["tokenizer"]["sha256"], shards]
        return _sha256(json.dumps(what, sort_keys=True).encode())

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
    def tokenizer_json(self) -> bytes:
        """The tokenizer's file, verified."""
        return self._verified(TOKENIZER)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_buffer(self.tokenizer_json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token id, int64 of shape (vocab_size,); special tokens 0."""
        return token_bytes(self.tokenizer, f"{self.where}/{TOKENIZER}")

    def split(self, name: str) -> "Split":
        if name not in self.manifest["splits"]:
            have = ", ".join(self.manifest["splits"])
            raise UserError(self.where, f"has no split {name!r}", f"it has {have}")
        return Split(self._store, name, self.manifest["splits"][name], self.manifest["dtype"])


class Split:
    """One split of a dataset: shards of tokens, read at any position.

    num_tokens (with one end-of-text a document), num_documents, num_bytes (UTF-8 of the documents),
    shard_tokens; dtype: of the tokens read, in native order. Reading is safe from several threads.
    """

    def __init__(self, store: Store, name: str, manifest: dict[str, Any], dtype: str):
        stored = np.dtype(dtype)
        self._stored = stored.newbyteorder("<") if dtype == stored.name else stored
        self.name, self.dtype = name, self._stored.newbyteorder("=")
        self.num_tokens: int = manifest["tokens"]
        self.num_documents: int = manifest["documents"]
        self.num_bytes: int = manifest["bytes"]
        self.shard_tokens: list[int] = [s["tokens"] for s in manifest["shards"]]
        self._store, self._rows = store, manifest["shards"]
        places = [store.where, *(row["file"] for row in self._rows)]
        self.is_remote = any("://" in place for place in places)  # then `will_read` is worth a call
        self.shard = lru_cache(_OPEN)(self._open)  # an evicted shard closes with its last reader

    def _open(self, shard: int) -> Shard:
        return Shard(self._store, self._rows[shard], self._stored, self.name, shard)

    def shard_name(self, shard: int) -> str:
        """The file that holds the shard."""
        return self._rows[shard]["file"]

    def read(self, shard: int, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of a shard, of shape (length,). Raises Damaged, naming
        file and member, where they can't be read or aren't what was written."""
        tokens = np.empty(length, self.dtype)
        self.shard(shard).read_into(start, tokens)
        return tokens

    def read_into(self, shard: int, start: int, out: np.ndarray) -> None:
        """`read` into an array, shape (length,), of any dtype that holds the ids."""
        self.shard(shard).read_into(start, out)

    def read_rows(self, shard: np.ndarray, start: np.ndarray, out: np.ndarray) -> None:
        """`read` many of one length at a time, the fastest way: window i into row i of `out`,
        shape (n, length), of any dtype that holds the ids. shard, start: shape (n,)."""
        rows: dict[int, tuple[list[int], list[int]]] = {}
        for row, (number, first) in enumerate(zip(shard.tolist(), start.tolist(), strict=True)):
            group = rows.get(number) or rows.setdefault(number, ([], []))
            group[0].append(row)
            group[1].append(first)
        for number, group in rows.items():
            self.shard(number).read_rows(*group, out)

    def document_ends(self, shard: int, start: int, length: int) -> np.ndarray:
        """Where documents end inside [start, start + length): exclusive and relative to start, in
        (0, length]; int64, ascending. Raises Damaged."""
        return self.shard(shard).document_ends(start, length)

    def members(self, shard: int, start: int, length: int) -> list[str]:
        """Keys of the members that hold these tokens; reads the index alone."""
        opened = self.shard(shard)
        return [opened.members[at].key for at in opened.touched(start, length)]

    def will_read(self, shard: np.ndarray, start: np.ndarray, length: np.ndarray) -> None:
        """A hint of what is read next, in this order; free where the files are local."""
        shards = {number: self.shard(number) for number in set(shard.tolist())}
        if all(opened.is_local for opened in shards.values()):
            return
        windows = zip(shard.tolist(), start.tolist(), length.tolist(), strict=True)
        for number, group in groupby(windows, key=lambda window: window[0]):
            ranges = [r for window in group for r in shards[number].byte_ranges(*window[1:])]
            shards[number].file.will_read(ranges)


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
