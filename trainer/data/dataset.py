"""Reading datasets: a manifest, shards of tokens, and an index beside every shard.

    manifest.json               contents of the dataset, and the request of its build
    files.json                  size and sha256 of every other file (forescale.ground.storage)
    tokenizer.json
    train-000000.tar            plain USTAR, readable by webdataset.WebDataset
      000000.tok.bin            little-endian uint16, or uint32 above 65,536 vocabulary entries
      000000.doc.bin            uint32 exclusive ends of the documents that end in this member,
                                counted in tokens from the member's first
      000000.learned.bin        only of conversations: a bit a token, 1 if it counts in the loss
    train-000000.index.json     offset, size and checksums of every member, cumulative tokens
    validation-000000.tar ...

A corpus that is used in place has no tars: the manifest names its original files, and the document
ends are in train-000000.doc.bin beside the index.

Invariants: the tokens read are the tokens written: the table of files verifies the manifest, the
manifest each index, and the index every chunk of tokens (forescale.data.shard). All sources of a
mixture have the same tokenizer, byte for byte, so an id means the same text in each.
"""

# ruff: noqa: UP013 - the types of stored values, in as many lines as they need
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer
from typing_extensions import TypedDict

from forescale.data.shard import FORMAT, MANIFEST, RESTORE, TOKENIZER, Damaged, Shard, StoredShard
from forescale.data.tokenizer import token_bytes
from forescale.ground.errors import UserError
from forescale.ground.foreign import parse_json
from forescale.ground.storage import TABLE, FileEntry
from forescale.ground.typed import Count, Number, Size, TokenId, typed
from forescale.remote.store import CACHE_BYTES, Store

if TYPE_CHECKING:
    from forescale.data.batches import Batches

__all__ = ["CURATION", "FORMAT", "MANIFEST", "ORIGINS", "TOKENIZER"]
__all__ += ["Damaged", "Dataset", "Sources", "Split"]

CURATION = "curation.json"  # what a curation kept, changed and dropped, with samples
ORIGINS = "origins.json"
SHUFFLE_SHARDS = 8  # the default of data.shuffle_shards in conf/data/*.yaml
_OPEN = 64  # shards of a split that are kept open at a time


# The content of manifest.json, which prepare/writer.py writes. lengths: number of documents of 2^i
# tokens and more; divided: of documents whose last part is held out.
# fmt: off
_Split = TypedDict("_Split", {
    "tokens": Count, "documents": Count, "bytes": Count, "shards": list[StoredShard],
})
_Input = TypedDict("_Input", {
    "name": str, "tokens": Count, "documents": Count, "bytes": Count, "divided": NotRequired[Count],
})
_Cases = TypedDict("_Cases", {"count": Count, "first": list[str]})
_Report = TypedDict("_Report", {
    "lengths": list[Count], "sources": list[_Input], "duplicates": dict[str, Count],
    "left_out": dict[str, _Cases],
}, total=False)
_Source = TypedDict("_Source", {"kind": str}, total=False)
_Build = TypedDict("_Build", {"source": _Source, "template": str | None}, total=False)
_Compressor = TypedDict("_Compressor", {
    "bits_per_byte": Number, "sample_bytes": NotRequired[Count],
})
_Tokenizer = TypedDict("_Tokenizer", {
    "sha256": str, "vocab_size": Size, "end_of_text": TokenId,
})
_Corpus = TypedDict("_Corpus", {"sha256": str})
_Manifest = TypedDict("_Manifest", {
    "format": Count,
    "dtype": Literal["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
                     ">u2", ">u4", ">u8", ">i2", ">i4", ">i8"],
    "tokenizer": _Tokenizer,
    "splits": dict[str, _Split],
    "corpus": _Corpus,
    "build": _Build, "report": _Report,
    "baselines": NotRequired[dict[str, _Compressor | Count] | None],
})
_Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]
_Step = TypedDict("_Step", {"read": _Pair, "changed": list[int], "dropped": dict[str, _Pair]})
_Curation = TypedDict("_Curation", {
    "samples_wanted": Count, "steps": dict[str, _Step], "lengths": list[list[Count]],
    "languages": dict[str, _Pair], "domains": dict[str, _Pair],
    "samples": dict[str, list[list[int | str]]],
})
_Origins = TypedDict("_Origins", {
    "sources": list[str], "kinds": list[str], "source": list[Count], "kind": list[Count],
})
# fmt: on


class Dataset:
    """A dataset in a directory or at a URL. Opening it reads the manifest only.

    vocab_size; end_of_text: the id that follows every document; corpus_hash: sha256 over the
    ordered names and hashes of the documents; manifest_hash: sha256 of manifest.json.
    """

    def __init__(self, path: str | Path, cache: Path | None = None, cache_bytes: int = CACHE_BYTES):
        """cache: local directory for parts of a remote dataset. Raises UserError if the path holds
        no dataset or the manifest is damaged."""
        self._store = Store(path, cache, cache_bytes)
        self.where = self._store.where  # for messages
        self.path = Path(self.where)  # only valid for a local dataset
        if not self._store.exists(MANIFEST):
            there = "://" not in self.where and self.path.is_dir()
            problem = f"not a dataset (no {MANIFEST})" if there else "no such dataset"
            raise UserError(self.where, problem, "make one with `forescale shards`")
        self._table = self._json(dict[str, FileEntry], TABLE, self._store.read(TABLE))
        raw = self._verified(MANIFEST)
        self.manifest_hash: str = self._table[MANIFEST].sha256
        version = self._json(dict[str, Any], MANIFEST, raw).get("format")
        if version != FORMAT:
            older = isinstance(version, int) and version < FORMAT
            todo = "build it again" if older else "install a newer version of forescale"
            problem = f"this version of forescale can't read its format {version}"
            raise UserError(self.where, problem, todo)
        self.manifest: dict[str, Any] = self._json(_Manifest, MANIFEST, raw)
        self.corpus_hash: str = self.manifest["corpus"]["sha256"]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.end_of_text: int = self.manifest["tokenizer"]["end_of_text"]

    def _json(self, kind: Any, name: str, raw: bytes) -> Any:
        where = f"{self.where}/{name}"
        return typed(kind, parse_json(raw, where), where, RESTORE)

    def _verified(self, name: str) -> bytes:
        """Return a small file, compared with the table of files."""
        where, entry = f"{self.where}/{name}", self._table.get(name)
        if entry is None:
            raise UserError(where, f"not listed in {TABLE}", RESTORE)
        raw = self._store.read(name)
        if entry != FileEntry(len(raw), _sha256(raw)):
            raise UserError(where, f"damaged: its size or sha256 differs from {TABLE}", RESTORE)
        return raw

    @property
    def origins(self) -> dict[str, Any] | None:
        """Where the held-out documents come from, in their order: `source` and `kind` index
        `sources`, the inputs' names, and `kinds`, file types such as ".py" ("" for none). None if
        the dataset doesn't record it."""
        if ORIGINS not in self._table:
            return None
        known: dict[str, Any] = self._json(_Origins, ORIGINS, self._verified(ORIGINS))
        return known

    @property
    def curation(self) -> dict[str, Any] | None:
        """What its curation read, kept, changed and dropped, with samples (data/curate/tally.py);
        None if it had none."""
        if CURATION not in self._table:
            return None
        counts: dict[str, Any] = self._json(_Curation, CURATION, self._verified(CURATION))
        return counts

    @cached_property
    def identity(self) -> str:
        """sha256 over everything that decides the tokens: shards, dtype, tokenizer.

        Equal for equal data; baselines, reports and paths aren't included.
        """
        m = self.manifest
        shards = {
            name: [(s["tokens"], s["sha256"] or s["content"]) for s in split["shards"]]
            for name, split in m["splits"].items()
        }
        content = [m["format"], m["dtype"], m["tokenizer"]["sha256"], shards]
        return _sha256(json.dumps(content, sort_keys=True).encode())

    @cached_property
    def tokenizer_json(self) -> bytes:
        """The bytes of tokenizer.json, verified."""
        return self._verified(TOKENIZER)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, without truncation and padding."""
        tokenizer = Tokenizer.from_buffer(self.tokenizer_json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token id, int64 of shape (vocab_size,); 0 for special tokens."""
        return token_bytes(self.tokenizer, f"{self.where}/{TOKENIZER}")

    def split(self, name: str) -> "Split":
        """Return a split by its name. Raises UserError if there is no such split."""
        if name not in self.manifest["splits"]:
            have = ", ".join(self.manifest["splits"])
            raise UserError(self.where, f"has no split {name!r}", f"choose one of: {have}")
        return Split(self._store, name, self.manifest["splits"][name], self.manifest["dtype"])

    def stream(self, sequence_length: int, batch: int, **options: Any) -> "Batches":
        """Return the training split as a PyTorch IterableDataset in the order of training, with
        exact resume; see `forescale.data.batches.Batches` for the arguments."""
        from forescale.data.batches import Batches  # with torch

        return Batches(self, sequence_length, batch, **options)


class Split:
    """One split of a dataset: shards of tokens, readable at any position.

    num_tokens (including one end-of-text token per document), num_documents, num_bytes (UTF-8 bytes
    of the documents), shard_tokens (tokens of every shard); dtype: of the tokens read, in native
    byte order. Reading is safe from several threads.
    """

    def __init__(self, store: Store, name: str, manifest: _Split, dtype: str):
        """manifest: the split's part of the manifest; dtype: of the stored tokens."""
        stored = np.dtype(dtype)
        stored = stored.newbyteorder("<") if dtype == stored.name else stored
        self.name, self.dtype = name, stored.newbyteorder("=")
        self.num_tokens: int = manifest["tokens"]
        self.num_documents: int = manifest["documents"]
        self.num_bytes: int = manifest["bytes"]
        self.shard_tokens: list[int] = [s["tokens"] for s in manifest["shards"]]
        self._store, self._rows = store, manifest["shards"]
        places = [store.where, *(row["file"] for row in self._rows)]
        self.is_remote = any("://" in place for place in places)  # then `will_read` is useful
        # An evicted shard closes with its last reader.
        self.shard = lru_cache(_OPEN)(lambda n: Shard(store, self._rows[n], stored, name, n))

    def shard_name(self, shard: int) -> str:
        """Return the name of the file that holds the shard."""
        return self._rows[shard]["file"]

    def read(self, shard: int, start: int, length: int) -> np.ndarray:
        """Return tokens [start, start + length) of a shard, shape (length,).

        Raises Damaged, naming file and member, if they are missing or fail their checksum.
        """
        tokens = np.empty(length, self.dtype)
        self.shard(shard).read_into(start, tokens)
        return tokens

    def read_into(self, shard: int, start: int, out: np.ndarray) -> None:
        """Like `read`, into an array of shape (length,) and any dtype that holds the ids."""
        self.shard(shard).read_into(start, out)

    def document_ends(self, shard: int, start: int, length: int) -> np.ndarray:
        """Return the document ends inside [start, start + length): exclusive, relative to start, in
        (0, length]; int64, ascending. Raises Damaged."""
        return self.shard(shard).document_ends(start, length)

    def learned(self, shard: int) -> np.ndarray | None:
        """Return True for the tokens of a shard that count in the loss: bool of shape (tokens,);
        None without such a column. Raises Damaged."""
        opened = self.shard(shard)
        parts = [opened.learned(at) for at in range(len(opened.members))]
        columns = [part for part in parts if part is not None]
        return np.concatenate(columns) if columns and len(columns) == len(parts) else None

    def members(self, shard: int, start: int, length: int) -> list[str]:
        """Return the keys of the members that hold these tokens; reads only the index."""
        opened = self.shard(shard)
        return [opened.members[at].key for at in opened.touched(start, length)]

    def will_read(self, shard: np.ndarray, start: np.ndarray, length: np.ndarray) -> None:
        """Announce windows that will be read next, in this order, so that remote ones can be
        prefetched; costs nothing for local files."""
        shards = {number: self.shard(number) for number in set(shard.tolist())}
        if all(opened.is_local for opened in shards.values()):
            return
        windows = zip(shard.tolist(), start.tolist(), length.tolist(), strict=True)
        for number, group in groupby(windows, key=lambda window: window[0]):
            ranges = [r for window in group for r in shards[number].byte_ranges(*window[1:])]
            shards[number].file.will_read(ranges)


class Sources:
    """One or several datasets by name, with their common properties as attributes.

    identity, corpus_hash: the dataset's own for a single source, otherwise sha256 over those of all
    sources. Raises UserError if their tokenizers differ.
    """

    def __init__(self, datasets: Mapping[str, Dataset]):
        self.datasets, self.names = dict(datasets), list(datasets)
        (_, self.first), *rest = self.datasets.items()
        for name, dataset in rest:
            described, expected = (d.manifest["tokenizer"] for d in (dataset, self.first))
            if any(described[key] != expected[key] for key in ("sha256", "end_of_text")):
                problem = f"{dataset.where} has a different tokenizer than {self.first.where}"
                todo = "build both with the same: forescale shards ... tokenizer=DIR/tokenizer.json"
                raise UserError(f"data.sources.{name}", problem, todo)
        self.is_mixture = bool(rest)
        self.vocab_size, self.end_of_text = self.first.vocab_size, self.first.end_of_text
        self.where = ", ".join(d.where for d in self.datasets.values())
        self.identity, self.corpus_hash = self.first.identity, self.first.corpus_hash
        if self.is_mixture:
            hashes = (
                {name: getattr(d, key) for name, d in self.datasets.items()}
                for key in ("identity", "corpus_hash")
            )
            self.identity, self.corpus_hash = (
                _sha256(json.dumps(h, sort_keys=True).encode()) for h in hashes
            )

    @property
    def tokenizer(self) -> Tokenizer:
        return self.first.tokenizer

    @property
    def token_bytes(self) -> np.ndarray:
        return self.first.token_bytes

    def split(self, name: str) -> dict[str, Split]:
        """Return the split of this name of every source."""
        return {source: d.split(name) for source, d in self.datasets.items()}

    def default_weights(self) -> dict[str, float]:
        """Return weights proportional to the number of training tokens of each source."""
        return {name: split.num_tokens for name, split in self.split("train").items()}

    def describe(self) -> dict[str, Any]:
        """Return path, identity and corpus hash of every source, as stored with a run; and the hash
        of its manifest, which chains what it was built of and how."""
        return {
            name: {
                "path": d.where if "://" in d.where else str(Path(d.where).resolve()),
                "identity": d.identity,
                "corpus_hash": d.corpus_hash,
                "manifest": d.manifest_hash,
            }
            for name, d in self.datasets.items()
        }


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
