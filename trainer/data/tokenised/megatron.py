"""The index of tokenised corpora of Megatron-LM and GPT-NeoX, NAME.idx beside NAME.bin.

    MMIDIDX\\0\\0, version (u64, 1), dtype code (u8), sequences (u64), documents + 1 (u64)
    int32[sequences]        tokens of each sequence
    int64[sequences]        its first byte in the .bin
    int64[documents + 1]    the first sequence of each document, and the number of sequences

Layout: megatron/core/datasets/indexed_dataset.py. All little-endian.

Invariant: an index is accepted only if all its numbers agree with each other and with the size of
the .bin: a truncated file of either kind, or one that belongs to another, raises UserError.
"""

import struct

import numpy as np

from forescale.data.text.opening import open_raw, reading, shown
from forescale.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
# 9 is used by forks; floats and int8 can't be token ids.
_CODES = {1: "uint8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16", 9: "uint32"}
_TODO = "restore both files from their source"


def read_idx(path: str, bin_where: str, bin_size: int) -> tuple[np.dtype, np.ndarray]:
    """Return the dtype, and the end of each document in tokens, int64 ascending. Raises UserError.

    Documents without a token, which some writers produce, are skipped. Needs about 30 bytes of
    memory per sequence.
    """
    with open_raw(path) as f, reading(path):
        raw = f.read()
    fault = UserError(
        shown(path), "isn't an index of a Megatron corpus, or its header is damaged", _TODO
    )
    begin = len(_MAGIC) + _HEADER.size
    if len(raw) < begin or not raw.startswith(_MAGIC):
        raise fault
    version, code, sequences, bounds = _HEADER.unpack_from(raw, len(_MAGIC))
    if version != 1:
        raise fault
    if code not in _CODES:
        problem = f"its dtype code {code} isn't one of integers"
        raise UserError(shown(path), problem, _TODO)
    want = begin + 12 * sequences + 8 * bounds
    if len(raw) != want:
        problem = f"has {len(raw):,} bytes, but its header says {want:,}"
        if len(raw) == want + sequences:
            problem = "belongs to a multimodal corpus"
        raise UserError(shown(path), problem, _TODO)
    dtype = np.dtype(_CODES[code]).newbyteorder("<")
    sizes = np.frombuffer(raw, "<i4", sequences, begin)
    pointers = np.frombuffer(raw, "<i8", sequences, begin + 4 * sequences)
    firsts = np.frombuffer(raw, "<i8", bounds, begin + 12 * sequences)
    ends = np.cumsum(sizes, dtype=np.int64)
    if problem := _disagreement(sizes, pointers, firsts, ends, dtype.itemsize):
        raise UserError(shown(path), f"damaged: {problem}", _TODO)
    if int(ends[-1]) * dtype.itemsize != bin_size:
        problem = f"has {bin_size:,} bytes, but its index says {int(ends[-1]) * dtype.itemsize:,}"
        raise UserError(shown(bin_where), problem, _TODO)
    found = np.concatenate([np.zeros(1, np.int64), ends])[firsts[1:]]
    return dtype, found[np.diff(found, prepend=0) > 0]


def _disagreement(
    sizes: np.ndarray, pointers: np.ndarray, firsts: np.ndarray, ends: np.ndarray, item: int
) -> str:
    """Return what is inconsistent in the index, or ""."""
    if not len(sizes) or not ends[-1]:
        return "it has no tokens"
    if (sizes < 0).any():
        return "a sequence has a negative number of tokens"
    if not np.array_equal(pointers, (ends - sizes) * item):
        return "its sequences don't follow each other in the .bin"
    if len(firsts) < 2 or firsts[0] or firsts[-1] != len(sizes) or (np.diff(firsts) < 0).any():
        return "its documents don't follow each other"
    return ""
