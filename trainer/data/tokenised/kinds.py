"""Files that hold token ids already, as others write them: which kind each is, and what is in it.

    NAME.bin + NAME.idx     Megatron-LM and GPT-NeoX (forescale.data.tokenised.megatron)
    NAME.npy                ids in one row, or rows of one length
    NAME.tar                a webdataset whose members are arrays: .npy, or raw ids in .bin or .tok
    NAME.bin                raw ids; the dtype is told

Invariant: a file is described only if all of it is accounted for, to the last byte: a header that
asks for more or fewer bytes than there are is a UserError, and so is an end of a tar that is none.
"""

import io
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from forescale.data.remote.transfer import is_url
from forescale.data.text.documents import Report
from forescale.data.text.opening import open_raw, reading, shown
from forescale.data.tokenised.megatron import read_idx
from forescale.errors import UserError

RESTORE = "restore it from its source"
_RAW = (".bin", ".tok")
_ARRAYS = (".npy", *_RAW)
_TEXTS = (".txt", ".md", ".py", ".jsonl")
_PEEKED = 32  # members of a tar that say what it holds
_DTYPES = ("uint8", "uint16", "uint32", "int16", "int32", "int64", "uint64")


class Run(NamedTuple):
    """Token ids that lie side by side: `offset` in bytes of its file, how many tokens."""

    offset: int
    tokens: int


@dataclass
class TokenFile:
    """What one file holds: runs of ids, in order, and where documents are known to end.

    where: a path or an address; ends: of documents, counted in tokens of the file, int64 ascending,
    none beyond the last run's end (which ends one anyhow); by_id: an end-of-text id ends one, too.
    """

    where: str
    size: int  # bytes
    dtype: np.dtype
    runs: list[Run]
    ends: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    by_id: bool = True

    @property
    def tokens(self) -> int:
        return sum(run.tokens for run in self.runs)


def kind_of_file(where: str) -> str | None:
    """ "megatron", "npy", "tar", "flat", or None for a file that holds no tokens, by its name; a
    tar is opened. Raises UserError where that can't be done."""
    name = where.partition("?")[0].lower() if is_url(where) else where.lower()
    if name.endswith(".idx"):
        return "megatron"
    if name.endswith(".npy"):
        return "npy"
    if name.endswith(".bin"):
        return "megatron" if not is_url(where) and Path(_idx(where)).is_file() else "flat"
    return "tar" if name.endswith(".tar") and _holds_arrays(where) else None


def describe(where: str, kind: str, dtype: np.dtype | None, left_out: Report) -> TokenFile:
    """dtype: of raw ids. Raises UserError for a file that isn't whole, or of another dtype."""
    with open_raw(where) as f:
        size = f.seek(0, io.SEEK_END)
        if kind == "megatron":
            found, ends = read_idx(_idx(where), where, size)
            return TokenFile(where, size, found, [Run(0, int(ends[-1]))], ends, by_id=False)
        if kind == "npy":
            found, run, rows = _npy(f, where, 0, size)
            ends = np.arange(1, run.tokens // rows + 1, dtype=np.int64) * rows
            return TokenFile(where, size, found, [run], ends)
        if kind == "tar":
            return _tar(f, where, size, dtype, left_out)
        told = _told(where, dtype)
        return TokenFile(where, size, told, [_raw(where, 0, size, told)])


def bin_of(where: str) -> str:
    """The file with the ids: of an .idx, the .bin beside it."""
    return where[: -len(".idx")] + ".bin" if where.endswith(".idx") else where


def _idx(where: str) -> str:
    return where[: -len(".bin")] + ".idx"


def _told(where: str, dtype: np.dtype | None) -> np.dtype:
    if dtype is None:
        what = "raw token ids don't say how wide they are"
        raise UserError(shown(where), what, "give their dtype, such as dtype=uint16")
    return dtype


def _raw(where: str, offset: int, size: int, dtype: np.dtype) -> Run:
    if size % dtype.itemsize or not size:
        what = f"{size:,} bytes are no whole number of {dtype.name} tokens" if size else "is empty"
        raise UserError(shown(where), what, f"give its dtype, or {RESTORE}")
    return Run(offset, size // dtype.itemsize)


def _npy(f: BinaryIO, where: str, offset: int, size: int) -> tuple[np.dtype, Run, int]:
    """An array in `size` bytes of a file: its dtype, its ids, the length of its rows."""
    f.seek(offset)
    try:
        version = np.lib.format.read_magic(f)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, by_columns, dtype = read(f)
    except (ValueError, KeyError, EOFError) as e:
        raise UserError(shown(where), f"its .npy header is damaged ({e})", RESTORE) from e
    if dtype.name not in _DTYPES or len(shape) not in (1, 2) or (by_columns and len(shape) > 1):
        order = " in columns" * by_columns
        what = f"holds {dtype.name} of shape {shape}{order}, which are no token ids"
        raise UserError(shown(where), what, "expected integers, in one dimension or in rows")
    begin = f.tell()
    tokens, have = int(np.prod(shape)), offset + size - begin
    if have != tokens * dtype.itemsize or not tokens:
        what = f"{have:,} bytes of tokens where its header says {tokens * dtype.itemsize:,}"
        raise UserError(shown(where), what, RESTORE)
    return dtype, Run(begin, tokens), int(shape[-1])


def _tar(f: BinaryIO, where: str, size: int, dtype: np.dtype | None, left_out: Report) -> TokenFile:
    """Every array of a webdataset is a run, and the end of a document."""
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
        what = f"its members hold arrays of {len(kinds)} kinds ({', '.join(sorted(kinds))})"
        raise UserError(shown(where), what, "make tars with one array of token ids a sample")
    runs, dtypes = [], set()
    for suffix, info in arrays:
        named = f"{where}: member {info.name}"
        if suffix.endswith("npy"):
            found, run, _ = _npy(f, named, info.offset_data, info.size)
        else:
            found = _told(where, dtype)
            run = _raw(named, info.offset_data, info.size, found)
        runs.append(run)
        dtypes.add(found)
    if len(dtypes) != 1:
        what = f"its members differ in dtype ({', '.join(sorted(d.str for d in dtypes))})"
        raise UserError(shown(where), what, "make tars of one dtype")
    ends = np.cumsum([run.tokens for run in runs], dtype=np.int64)
    return TokenFile(where, size, dtypes.pop(), runs, ends)


def tar_members(f: BinaryIO, where: str, size: int) -> list[tarfile.TarInfo]:
    """The headers of a tar. tarfile takes a damaged one, or a cut between two members, for the end;
    here only zeros, two blocks or more and up to the last byte, are. Raises UserError."""
    f.seek(0)
    with reading(where), tarfile.open(fileobj=f, mode="r:", encoding="utf-8") as tar:
        members = tar.getmembers()
        end = tar.offset
    f.seek(end)
    rest = size - end
    zeros = all(not block.strip(b"\0") for block in iter(lambda: f.read(1 << 16), b""))
    if rest < 2 * tarfile.BLOCKSIZE or not zeros:
        what = f"its members end at byte {end:,}, and no end of a tar follows: cut off or damaged"
        raise UserError(shown(where), what, RESTORE)
    return members


def _holds_arrays(where: str) -> bool:
    """Whether the first members of a tar say that it holds ids and not text."""
    seen = False
    with open_raw(where) as f, reading(where):
        try:
            with tarfile.open(fileobj=f, mode="r:", encoding="utf-8") as tar:
                for _ in range(_PEEKED):
                    if (info := tar.next()) is None:
                        break
                    name = re.sub(r"\.(gz|zst)$", "", info.name.lower())
                    if name.endswith(_TEXTS):
                        return False
                    seen = seen or name.endswith(_ARRAYS)
        except tarfile.TarError:
            return seen  # its reader names the damage
    return seen
