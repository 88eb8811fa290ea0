"""Samples of the text: what a BPE is trained on, and what compressors are tried on.

Invariant: chosen by the documents' keys, kept in plan order; at most the bytes that the plan allows
and one document more, of which no more than `limit` bytes are taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forescale.data.prepare import baselines
from forescale.data.prepare.columns import UnitFile, UnitWriter, finished
from forescale.data.prepare.dedupe import Run
from forescale.data.prepare.pool import Tick
from forescale.data.prepare.selection import Part, Plan
from forescale.data.text.documents import Report, Source, Unit
from forescale.data.text.pieces import cut

TOKENIZER, BEFORE, HELD_OUT = 1, 2, 4  # what a text is for: bits of a flag


@dataclass(frozen=True)
class SampleJob:
    """Collect a unit's texts that the plan wants. A unit without any isn't read, and has no file.

    limit: bytes of a document that go into the tokenizer's sample.
    """

    source: Source
    plan: Plan
    directory: Path
    limit: int

    def __call__(self, item: tuple[int, Unit], tick: Tick) -> None:
        number, unit = item
        path = self.directory / f"{number:06d}"
        if not finished(path) and self._wants(number):
            with UnitWriter(path) as out:
                sizes, flags = [], []
                for part in self.plan.parts(self.source, number, unit, Report()):
                    if flag := self._flag(part):
                        text = part.text
                        if flag == TOKENIZER:
                            text = text[: cut(text, 0, self.limit)]
                        out.add(text)
                        sizes.append(len(text))
                        flags.append(flag)
                columns = (np.array(sizes, "<u8"), np.array(flags, "<u8"))
                out.finish({"texts": len(sizes), "offsets": [out.add(c) for c in columns]})
        tick(unit.size, 0)

    def _wants(self, number: int) -> bool:
        if (bounds := self.plan.bounds).is_single:
            return True
        end = max(bounds.tokenizer, bounds.compared)
        start = 0 if bounds.compared else bounds.held_out
        with UnitFile(self.plan.hashes / f"{number:06d}") as file:
            for run in map(Run._make, file.facts["runs"]):
                first = file.search(run.offset, run.distinct, start)
                if first < file.search(run.offset, run.distinct, end):
                    return True
        return False

    def _flag(self, part: Part) -> int:
        bounds = self.plan.bounds
        if part.split != "train":
            return HELD_OUT if bounds.compared else 0
        return TOKENIZER * (part.key < bounds.tokenizer) + BEFORE * (part.key < bounds.compared)


def texts(directory: Path, units: int, flag: int) -> Iterator[bytes]:
    """The collected texts that are for `flag`, in plan order."""
    for number in range(units):
        if not (path := directory / f"{number:06d}").exists():
            continue
        with UnitFile(path) as file:
            count, (sizes, flags) = file.facts["texts"], file.facts["offsets"]
            at = 0
            for size, bits in zip(
                file.column(sizes, count, "<u8").tolist(),
                file.column(flags, count, "<u8").tolist(),
                strict=True,
            ):
                if bits & flag:
                    yield bytes(file.column(at, size, np.uint8))
                at += size


@dataclass(frozen=True)
class BaselinesJob:
    """What compressors need for the held-out text, given as the file to write it to."""

    directory: Path
    units: int

    def __call__(self, item: Path, tick: Tick) -> None:
        if finished(item):
            return
        held_out = list(texts(self.directory, self.units, HELD_OUT))
        before = list(texts(self.directory, self.units, BEFORE))
        with UnitWriter(item) as out:
            # Of a single document that is too short to be cut nothing is held out.
            rows: dict[str, Any] = baselines.compress(held_out, before) if held_out else {}
            out.finish(rows)
