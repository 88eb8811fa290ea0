"""MinHash signatures of texts by Daft's kernel, and the hashes of their bands.

Two documents are candidates if all rows of one band are equal: with Jaccard similarity s of their
sets of word n-grams that has probability 1 - (1 - s^rows)^bands. The default of 14 bands of 8 rows
over word 5-grams is that of FineWeb (arXiv 2406.17557) and datatrove: 0.56 at s = 0.7, 0.92 at 0.8,
0.9996 at 0.9.

Texts are normalised in the manner of datatrove: lower case, no diacritics, runs of digits as one 0,
punctuation and white space as one space. A character of Chinese or Japanese is a word. A text of
fewer words than an n-gram is equal to those with the same normalised text; one without any word to
those with the same text.

Invariant: the hashes of a text depend on it, the settings and `version()` alone.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

import numpy as np

from forescale.data.curate.words import mixed
from forescale.ground.errors import UserError

VERSION = 1  # raise it when the same text gets other hashes
_BATCH = 4 << 20  # characters; a longer text is a batch of its own
_TEXTS = 1 << 14  # texts in a batch
_MARKS = re.compile("[\u0300-\u036f]+")
_PUNCTUATION = re.compile(
    "[\u0080-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7\u0964\u0965\u2000-\u206f"
    "\u20a0-\u20cf\u2190-\u2bff\u3000-\u3004\u3008-\u3020\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40"
    "\uff5b-\uff65]+"
)
_ALONE = re.compile("[\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")


def _plain(byte: int) -> int:
    char = chr(byte)
    return ord(char.lower()) if byte >= 128 or char.isalpha() else 48 if char.isdigit() else 32


_TABLE = bytes(b if b >= 128 else _plain(b) for b in range(256))


@dataclass(frozen=True)
class MinHash:
    """Settings of the signatures: bands x rows hashes over n-grams of `words` words."""

    bands: int = 14  # documents with one equal band are near-duplicates
    rows: int = 8  # hashes of a band
    words: int = 5  # words of an n-gram
    seed: int = 1  # of the hashes

    def check(self) -> None:
        ranges = (("bands", 1, 256), ("rows", 1, 64), ("words", 1, 64), ("seed", 0, 1 << 31))
        for key, least, most in ranges:
            if not least <= (value := getattr(self, key)) <= most:
                problem, todo = f"{value} is out of range", f"set it to {least} to {most}"
                raise UserError(f"minhash.{key}", problem, todo)


def version() -> str:
    """Return what decides the hashes beside text and settings; it belongs to the identity of a
    dataset. Raises UserError without Daft."""
    try:
        return f"minhash {VERSION}, daft {package_version('daft')}, {unicodedata.unidata_version}"
    except PackageNotFoundError:
        raise _missing() from None


def _missing() -> UserError:
    problem = "near-duplicates need the package daft, which isn't installed"
    return UserError("curate.near_duplicates", problem, 'pip install ".[curate]"')


def _series() -> Any:
    """Return Daft's class of a column."""
    # Before the import: Daft would report its use over the network.
    os.environ["DAFT_ANALYTICS_ENABLED"], os.environ["DO_NOT_TRACK"] = "0", "1"
    try:
        from daft import Series
    except ImportError:
        raise _missing() from None
    return Series


def normalised(text: str) -> str:
    """Return the text that is compared: words with single spaces; see the head of this file."""
    if not text.isascii():
        text = unicodedata.normalize("NFD", text.lower())
        text = _ALONE.sub(r" \g<0> ", _PUNCTUATION.sub(" ", _MARKS.sub("", text)))
    raw = b" ".join(text.encode().translate(_TABLE).split())
    while b"00" in raw:
        raw = raw.replace(b"00", b"0")
    return raw.decode() or text


def band_hashes(texts: Iterable[str], settings: MinHash) -> Iterator[np.ndarray]:
    """Yield the hashes of batches of texts, in order: uint64 of shape (texts, bands). The number of
    the band is part of a hash, so hashes of different bands don't meet.

    Memory: some 60 MB, and several times the longest text.
    """
    series = _series()
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(normalised(text))
        size += len(batch[-1])
        if size >= _BATCH or len(batch) == _TEXTS:
            yield _hashes(series, batch, settings)
            batch, size = [], 0
    if batch:
        yield _hashes(series, batch, settings)


def _hashes(series: Any, texts: list[str], settings: MinHash) -> np.ndarray:
    count = settings.bands * settings.rows
    column = series.from_pylist(texts).minhash(count, settings.words, settings.seed)
    flat = column.to_arrow().flatten().to_numpy(zero_copy_only=False)
    rows = flat.reshape(len(texts), settings.bands, settings.rows).astype(np.uint64)
    band_hash = np.broadcast_to(np.arange(1, settings.bands + 1, dtype=np.uint64), rows.shape[:2])
    for i in range(settings.rows):
        band_hash = mixed(band_hash ^ rows[:, :, i]) + np.uint64(i)
    return np.ascontiguousarray(band_hash)
