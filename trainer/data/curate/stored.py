"""The kept text of a unit in its file, in compressed blocks of about a megabyte.

Each block is names, addresses and attributes as JSON, then the texts. Invariant: documents come in
their order; one that is larger than a block has a block of its own.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from forescale.data.curate.step import Draft
from forescale.data.prepare.columns import UnitFile, UnitWriter

_BLOCK = 1 << 20  # bytes of text that are compressed at once


class Blocks:
    """Writes documents as compressed blocks."""

    def __init__(self, out: UnitWriter):
        self._out, self._packer = out, zstandard.ZstdCompressor(level=1)
        self._heads: list[list[Any]] = []
        self._texts: list[bytes] = []
        self._held = 0
        self._places: list[list[int]] = []

    def add(self, draft: Draft, text: bytes) -> None:
        self._heads.append([draft.name, len(text), draft.url, draft.attributes])
        self._texts.append(text)
        self._held += len(text)
        if self._held >= _BLOCK:
            self._flush()

    def finish(self) -> list[list[int]]:
        """Return offset, size and number of documents of each block."""
        self._flush()
        return self._places

    def _flush(self) -> None:
        if self._texts:
            head = json.dumps(self._heads).encode()
            data = self._packer.compress(b"\n".join([head, b"".join(self._texts)]))
            self._places.append([self._out.add(data), len(data), len(self._texts)])
            self._heads, self._texts, self._held = [], [], 0


def drafts(path: Path) -> Iterator[tuple[Draft, bytes]]:
    """Yield the documents of a unit's file, each with its text as bytes (text="" in the draft)."""
    with UnitFile(path) as file:
        for offset, size, _ in file.facts["blocks"]:
            yield from _block(file, offset, size)


def _block(file: UnitFile, offset: int, size: int) -> Iterator[tuple[Draft, bytes]]:
    data = zstandard.ZstdDecompressor().decompress(file.column(offset, size, "u1").tobytes())
    head, _, texts = data.partition(b"\n")
    at = 0
    for name, length, url, attributes in json.loads(head):
        yield Draft(name, "", url, attributes), texts[at : at + length]
        at += length


class Texts:
    """Returns the text of any document of a build, by unit and number; holds the blocks that it
    read last."""

    def __init__(self, directory: Path, held: int = 8):
        self._directory, self._held = directory, held
        self._blocks: OrderedDict[tuple[int, int], list[str]] = OrderedDict()

    def __call__(self, unit: int, document: int) -> str:
        with UnitFile(self._directory / f"{unit:06d}") as file:
            for offset, size, count in file.facts["blocks"]:
                if document < count:
                    return self._texts(file, (unit, offset), size)[document]
                document -= count
        raise IndexError(document)

    def _texts(self, file: UnitFile, key: tuple[int, int], size: int) -> list[str]:
        if key not in self._blocks:
            self._blocks[key] = [text.decode() for _, text in _block(file, key[1], size)]
            if len(self._blocks) > self._held:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]
