"""Files of token ids of other tools: their kinds and contents.

    NAME.bin + NAME.idx     Megatron-LM and GPT-NeoX
    NAME.npy                ids in one row, or rows of equal length
    NAME.tar                a webdataset whose members are arrays: .npy, or raw ids in .bin or .tok
    NAME.bin                raw ids; the user gives the dtype

The .idx of Megatron (megatron/core/datasets/indexed_dataset.py), all little-endian:

    MMIDIDX\\0\\0, version (u64, 1), dtype code (u8), sequences (u64), documents + 1 (u64)
    int32[sequences]        tokens of each sequence
    int64[sequences]        its first byte in the .bin
    int64[documents + 1]    the first sequence of each document, and the number of sequences

Invariant: a file is accepted only if every byte of it is accounted for: a header that implies more
or fewer bytes than there are raises UserError, and so do an index whose numbers disagree with each
other or with the size of the .bin, and a tar without its end.
"""

import io
import re
import struct
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from forescale.data.text.documents import ReadingReport
from forescale.data.text.opening import HTML, PLAIN, open_raw, printable, reading
from forescale.data.text.tars import BoundedTar, BrokenTarError
from forescale.ground.errors import UserError
from forescale.remote.transfer import is_url

RESTORE = "restore it from its source"
_RAW = (".bin", ".tok")
_ARRAYS = (".npy", *_RAW)
_TEXTS = (*PLAIN, *HTML, ".jsonl")
_PEEKED = 32  # members of a tar that decide its kind
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
# 9 is used by forks; floats and int8 can't be token ids.
_CODES = {1: "uint8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16", 9: "uint32"}
_BOTH = "restore both files from their source"
_DTYPES = ("uint8", "uint16", "uint32", "int16", "int32", "int64", "uint64")


class Extent(NamedTuple):
    """Token ids stored one after the other: `offset` in bytes of the file, number of tokens."""

    offset: int
    tokens: int


@dataclass
class TokenFile:
    """The contents of one file: extents of ids, in order, and known document ends.

    where: a path or an address; ends: of documents, counted in tokens of the file, int64 ascending,
    none beyond the last extent's end (which always ends one); by_id: each end-of-text id ends a
    document, too.
    """

    where: str
    size: int  # bytes
    dtype: np.dtype
    extents: list[Extent]
    ends: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    by_id: bool = True

    @property
    def tokens(self) -> int:
        return sum(extent.tokens for extent in self.extents)


def kind_of_file(where: str) -> str | None:
    """Return "megatron", "npy", "tar", "flat", or None for a file without tokens, by its name; a
    tar is opened. Raises UserError if that fails."""
    name = where.partition("?")[0].lower() if is_url(where) else where.lower()
    if name.endswith(".idx"):
        return "megatron"
    if name.endswith(".npy"):
        return "npy"
    if name.endswith(".bin"):
        return "megatron" if not is_url(where) and Path(f"{where[:-4]}.idx").is_file() else "flat"
    if not name.endswith(".tar"):
        return None
    has_arrays = False  # among the first members, and no text
    with open_raw(where) as f, reading(where):
        try:
            with BoundedTar.open(fileobj=f, mode="r:", encoding="utf-8") as tar:
                for _ in range(_PEEKED):
                    if (info := tar.next()) is None:
                        break
                    member = re.sub(r"\.(gz|zst)$", "", info.name.lower())
                    if member.endswith(_TEXTS):
                        return None
                    has_arrays = has_arrays or member.endswith(_ARRAYS)
        except (tarfile.TarError, BrokenTarError):
            pass  # the reader will report the damage
    return "tar" if has_arrays else None


def describe(where: str, kind: str, dtype: np.dtype | None, left_out: ReadingReport) -> TokenFile:
    """Return the contents of a file. dtype: of raw ids.

    Raises UserError for a file that is incomplete or has another dtype.
    """
    with open_raw(where) as f:
        size = f.seek(0, io.SEEK_END)
        if kind == "megatron":
            stored, ends = read_idx(f"{where[:-4]}.idx", where, size)
            return TokenFile(where, size, stored, [Extent(0, int(ends[-1]))], ends, by_id=False)
        if kind == "npy":
            stored, extent, rows = _npy(f, where, 0, size)
            ends = np.arange(1, extent.tokens // rows + 1, dtype=np.int64) * rows
            return TokenFile(where, size, stored, [extent], ends)
        if kind == "tar":
            return _tar(f, where, size, dtype, left_out)
        stored, extent = _raw(where, 0, size, dtype)
        return TokenFile(where, size, stored, [extent])


def bin_of(where: str) -> str:
    """Return the file with the ids: for an .idx, the .bin beside it."""
    return where[: -len(".idx")] + ".bin" if where.endswith(".idx") else where


def _raw(where: str, offset: int, size: int, dtype: np.dtype | None) -> tuple[np.dtype, Extent]:
    """Return dtype and ids of `size` bytes that have no header."""
    if dtype is None:
        problem = "holds raw token ids, whose dtype must be given"
        raise UserError(printable(where), problem, "write such as dtype=uint16")
    if size % dtype.itemsize or not size:
        problem = f"{size:,} bytes aren't a whole number of {dtype.name} tokens"
        todo = f"give the correct dtype, or {RESTORE}"
        raise UserError(printable(where), problem if size else "is empty", todo)
    return dtype, Extent(offset, size // dtype.itemsize)


def _npy(f: BinaryIO, where: str, offset: int, size: int) -> tuple[np.dtype, Extent, int]:
    """Return dtype, ids and row length of an array in `size` bytes of a file."""
    f.seek(offset)
    try:
        version = np.lib.format.read_magic(f)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, by_columns, dtype = read(f)
    except (ValueError, KeyError, EOFError) as e:
        raise UserError(printable(where), f"its .npy header is damaged ({e})", RESTORE) from e
    if dtype.name not in _DTYPES or len(shape) not in (1, 2) or (by_columns and len(shape) > 1):
        order = " in columns" * by_columns
        problem = f"holds {dtype.name} of shape {shape}{order}, which can't be token ids"
        raise UserError(printable(where), problem, "give integers, in one dimension or in rows")
    begin = f.tell()
    tokens, have = int(np.prod(shape)), offset + size - begin
    if have != tokens * dtype.itemsize or not tokens:
        problem = f"has {have:,} bytes of tokens, but its header says {tokens * dtype.itemsize:,}"
        raise UserError(printable(where), problem, RESTORE)
    return dtype, Extent(begin, tokens), int(shape[-1])


def _tar(
    f: BinaryIO, where: str, size: int, dtype: np.dtype | None, left_out: ReadingReport
) -> TokenFile:
    """Return the contents of a webdataset: every array is an extent and ends a document."""
    arrays = []
    others = Counter[str]()
    for info in tar_members(f, where, size):
        suffix = PurePosixPath(info.name).name.partition(".")[2]
        if info.isdir():
            continue
        if info.isreg() and not info.issparse() and f".{suffix}".endswith(_ARRAYS):
            arrays.append((suffix, info))
        else:
            others[suffix] += 1
            left_out.add("no token ids", f"{Path(where).name}/{info.name}")
    if len(kinds := {suffix for suffix, _ in arrays}) != 1:
        problem = f"its members hold arrays of {len(kinds)} kinds ({', '.join(sorted(kinds))})"
        todo = "make tars with one array of token ids per sample"
        raise UserError(printable(where), problem, todo)
    extents, dtypes = [], set()
    for suffix, info in arrays:
        named = f"{where}: member {info.name}"
        if suffix.endswith("npy"):
            stored, extent, _ = _npy(f, named, info.offset_data, info.size)
        else:
            stored, extent = _raw(named, info.offset_data, info.size, dtype)
        extents.append(extent)
        dtypes.add(stored)
    if len(dtypes) != 1:
        problem = f"its members have different dtypes ({', '.join(sorted(d.str for d in dtypes))})"
        raise UserError(printable(where), problem, "make tars with one dtype")
    ends = np.cumsum([extent.tokens for extent in extents], dtype=np.int64)
    return TokenFile(where, size, dtypes.pop(), extents, ends)


def read_idx(path: str, bin_where: str, bin_size: int) -> tuple[np.dtype, np.ndarray]:
    """Return the dtype, and the end of each document in tokens, int64 ascending. Raises UserError.

    Documents without a token, which some writers produce, are skipped. Needs about 30 bytes of
    memory per sequence.
    """
    with open_raw(path) as f, reading(path):
        raw = f.read()
    begin = len(_MAGIC) + _HEADER.size
    is_index = len(raw) >= begin and raw.startswith(_MAGIC)
    head = _HEADER.unpack_from(raw, len(_MAGIC)) if is_index else (0, 0, 0, 0)
    version, code, sequences, bounds = head
    if version != 1:
        problem = "isn't an index of a Megatron corpus, or its header is damaged"
        raise UserError(printable(path), problem, _BOTH)
    if code not in _CODES:
        raise UserError(printable(path), f"its dtype code {code} isn't one of integers", _BOTH)
    expected = begin + 12 * sequences + 8 * bounds
    if len(raw) != expected:
        problem = f"has {len(raw):,} bytes, but its header says {expected:,}"
        if len(raw) == expected + sequences:
            problem = "belongs to a multimodal corpus"
        raise UserError(printable(path), problem, _BOTH)
    dtype = np.dtype(_CODES[code]).newbyteorder("<")
    sizes = np.frombuffer(raw, "<i4", sequences, begin)
    pointers = np.frombuffer(raw, "<i8", sequences, begin + 4 * sequences)
    firsts = np.frombuffer(raw, "<i8", bounds, begin + 12 * sequences)
    ends = np.cumsum(sizes, dtype=np.int64)
    firsts_fit = len(firsts) > 1 and not firsts[0] and firsts[-1] == sequences
    problem = ""
    if not sequences or not ends[-1]:
        problem = "it has no tokens"
    elif (sizes < 0).any():
        problem = "a sequence has a negative number of tokens"
    elif not np.array_equal(pointers, (ends - sizes) * dtype.itemsize):
        problem = "its sequences don't follow each other in the .bin"
    elif not firsts_fit or (np.diff(firsts) < 0).any():
        problem = "its documents don't follow each other"
    if problem:
        raise UserError(printable(path), f"damaged: {problem}", _BOTH)
    if int(ends[-1]) * dtype.itemsize != bin_size:
        problem = f"has {bin_size:,} bytes, but its index says {int(ends[-1]) * dtype.itemsize:,}"
        raise UserError(printable(bin_where), problem, _BOTH)
    document_ends = np.append(0, ends)[firsts[1:]]
    return dtype, document_ends[np.diff(document_ends, prepend=0) > 0]


def tar_members(f: BinaryIO, where: str, size: int) -> list[tarfile.TarInfo]:
    """Return the headers of a tar. Raises UserError.

    tarfile takes a damaged header, or a cut between two members, for the end; here only zeros are
    the end, at least two blocks and up to the last byte.
    """
    f.seek(0)
    with reading(where), BoundedTar.open(fileobj=f, mode="r:", encoding="utf-8") as tar:
        members = tar.getmembers()
        end = tar.offset
    f.seek(end)
    rest = size - end
    zeros = all(not block.strip(b"\0") for block in iter(lambda: f.read(1 << 16), b""))
    if rest < 2 * tarfile.BLOCKSIZE or not zeros:
        at = f"its members end at byte {end:,}, but no end of a tar follows"
        problem = f"truncated or damaged: {at}"
        raise UserError(printable(where), problem, RESTORE)
    return members
