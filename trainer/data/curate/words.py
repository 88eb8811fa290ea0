"""Words of a text and hashes of n-grams of words, in numpy.

A word is a run of bytes without ASCII white space. A character of Chinese or Japanese (UTF-8 lead
bytes E3 to E9) is a word by itself, since these are written without spaces; Thai, Lao, Khmer and
Burmese are not divided.

Invariant: a hash depends on the words alone, not on their place, the machine or the version of a
package, so hashes may be stored and compared across processes.
"""

from typing import NamedTuple

import numpy as np

_PIECE = 1 << 18  # bytes hashed at once: about 40 bytes of memory for each
_LONG = 1 << 10  # the powers repeat after so many bytes of a word
_ODD = 0x9E3779B97F4A7C15
_POWERS = np.cumprod(np.full(_LONG, 0xD6E8FEB86659FD93, np.uint64))


class Words(NamedTuple):
    """The words of a text, in order: offsets of their first byte and of their end, their hashes."""

    start: np.ndarray  # int64
    end: np.ndarray
    hash: np.ndarray  # uint64


def mixed(x: np.ndarray) -> np.ndarray:
    """Return uint64 numbers with all their bits mixed: the finaliser of MurmurHash3."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def words_of(text: bytes) -> Words:
    """Return the words of valid UTF-8. Memory: 24 bytes for each word."""
    parts, at = [], 0
    while at < len(text):
        stop = _piece_end(text, at)
        parts.append(_words_of_piece(np.frombuffer(text, np.uint8, stop - at, at), at))
        at = stop
    if not parts:
        return Words(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64))
    return Words(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _piece_end(text: bytes, at: int) -> int:
    """Return the end of a piece: after white space, so that no word is cut; without any in the
    piece it grows."""
    stop = at + _PIECE
    while stop < len(text):
        if (end := max(text.rfind(b" ", at, stop), text.rfind(b"\n", at, stop))) >= at:
            return end + 1
        stop += _PIECE
    return len(text)


def _words_of_piece(raw: np.ndarray, offset: int) -> Words:
    is_space = (raw == 32) | (raw - np.uint8(9) < 5)  # below 9 it wraps to large numbers
    first = ~is_space
    first[1:] &= is_space[:-1]
    if (alone := raw - np.uint8(0xE3) < 7).any():
        first |= alone
        first[3:] |= alone[:-3] & ~is_space[3:]  # these characters have three bytes
    start = np.flatnonzero(first)
    if not len(start):
        return Words(start, start, np.empty(0, np.uint64))
    last = ~is_space  # a word ends before white space, or before the word behind it
    last[:-1] &= is_space[1:] | first[1:]
    # The bytes from the start of a word up to the next one; white space among them adds nothing.
    stretch = np.diff(start, append=len(raw))
    begin = int(start[0])
    place = (np.arange(begin, len(raw)) - np.repeat(start, stretch)) & (_LONG - 1)
    values = ((raw[begin:] + np.uint8(1)) * ~is_space[begin:]).astype(np.uint64)  # no byte is 255
    sums = np.add.reduceat(values * _POWERS[place], start - begin)
    return Words(start + offset, np.flatnonzero(last) + 1 + offset, mixed(sums))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return the hash of each n-gram, in order: `len(hashes) - n + 1`, or none. They are combined
    by doubling, so the time grows with the logarithm of n."""
    if len(hashes) < n:
        return np.empty(0, np.uint64)
    block, size = hashes, 1  # n-grams of `size` words, a power of two
    result, length = hashes[:0], 0  # those of `length` words so far
    while True:
        if n & size:
            result, length = _joined(result, block, length) if length else block, length + size
        if length == n:
            return result[: len(hashes) - n + 1]
        block, size = _joined(block, block, size), 2 * size


def _joined(left: np.ndarray, right: np.ndarray, length: int) -> np.ndarray:
    """Return hashes of n-grams that consist of one of `left`, `length` words long, and the one of
    `right` behind it."""
    count = min(len(left), len(right) - length)
    return mixed(left[:count] * np.uint64(_ODD) + right[length : length + count])
