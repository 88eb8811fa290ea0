"""What a curation does across documents, once each has gone through the steps: those go that an
earlier dataset has, and near-duplicates, and passages that occurred before are cut.

    signatures/000012   a unit's keys           edges/0003     equal keys of a range
    near                all documents that go, and for which
    anchors/000012      a unit's passages       repeats/0003   those of a range that occurred before
    passages/000012     what is cut of a unit      counted/000012   its tally

In signatures/ and anchors/ the units of earlier datasets come first, and the new ones are counted
on behind them: `first` is the number of the first new one there.

Invariant: the documents that remain depend on the documents, their order, the settings and the
earlier datasets alone.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from forescale.data.curate.curation import Curation
from forescale.data.curate.duplicates import (
    Equal,
    Settings,
    dropped_of,
    find_edges,
    resolve,
    sign_unit,
    signatures,
)
from forescale.data.curate.earlier import Earlier
from forescale.data.curate.step import Draft
from forescale.data.curate.stored import Texts, drafts
from forescale.data.curate.substrings import (
    Substrings,
    anchor_runs,
    anchor_unit,
    cut_unit,
    find_repeats,
    without,
)
from forescale.data.curate.tally import Tally
from forescale.data.prepare.columns import UnitFile, UnitWriter, facts, finished
from forescale.data.prepare.pool import Task, Tick
from forescale.data.prepare.selection import range_edges
from forescale.data.text.documents import Unit

AGAINST, NEAR, PASSAGES = "against", "near_duplicates", "repeated_passages"  # as steps of a tally
_NEAR, _NOTHING = "near-duplicate", "nothing left"  # reasons
_SCORE = "score"  # the attribute of the rule `score`
Phase = Callable[[str, str, int, Sequence[Task]], None]


class Across:
    """The files of these phases in the work directory of a build; `run` makes them."""

    def __init__(self, work: Path, curated: Path, curation: Curation, units: Sequence[Unit]):
        self.work, self.curated, self.curation, self.units = work, curated, curation, units
        self.earlier = Earlier(tuple(curation.against))
        self.first = len(self.earlier.units)
        self.near = work / "near" if curation.near or curation.against else None
        self.passages = work / "passages" if curation.passages is not None else None

    @property
    def counted(self) -> Path:
        """The directory whose files have the tallies of units."""
        return self.work / "counted" if self.near or self.passages else self.curated

    def run(self, phase: Phase) -> None:
        """Make what the settings ask for. phase: runs tasks, given its name, unit and total."""
        if self.near is not None:
            self._find_duplicates(self.curation.near or Equal(), phase)
        if self.curation.passages is not None:
            self._find_passages(self.curation.passages, phase)
        if self.curation.compares:
            self._each_unit(phase, "count", partial(_count, self), self._folder("counted"))

    def read(self, number: int) -> Iterator[tuple[Draft, bytes, str]]:
        """Yield the documents of a unit: name, address and attributes, what remains of the text,
        and why nothing does ("" otherwise)."""
        gone, cut = self.gone(number), self._cut(number)
        for place, (draft, text) in enumerate(drafts(self.curated / f"{number:06d}")):
            reason = ""
            if place in gone:
                text, reason = b"", self._reason(gone[place])[1]
            elif place in cut:
                text = without(text.decode(), cut[place]).encode()
                reason = "" if text and not text.isspace() else _NOTHING
            yield draft, text, reason

    def tally(self, number: int) -> Tally:
        """Return the tally of a unit: of its steps, and of what goes and is cut afterwards."""
        tally = Tally(**facts(self.curated / f"{number:06d}")["tally"])
        parts = (AGAINST, self.first), (NEAR, self.curation.near), (PASSAGES, self.passages)
        steps = [name for name, does in parts if does]
        for name in steps:
            tally.step(name)
        gone = self.gone(number)
        every = zip(drafts(self.curated / f"{number:06d}"), self.read(number), strict=True)
        for place, ((draft, raw), (_, text, reason)) in enumerate(every):
            before, draft.text = raw.decode(), text.decode()
            stays = gone.get(place)
            last = self._reason(stays)[0] if stays else PASSAGES
            for name in steps[: steps.index(last) + 1] if last in steps else steps:
                tally.arrived(name, len(raw))
            if reason:
                draft.text = before
                tally.dropped(last, reason, draft, len(raw), stays=stays)
                continue
            if text != raw:
                tally.changed(PASSAGES, before, draft)
            tally.remains(draft, len(text))
        tally.fill(self.texts())
        return tally

    def texts(self) -> Callable[[int, int], str]:
        """Return a function that returns the text of any document, by its unit as in anchors/."""
        new, first = Texts(self.curated), self.first
        return lambda unit, document: (
            new(unit - first, document) if unit >= first else self.earlier.text(unit, document)
        )

    def compared(self, place: int) -> Iterator[tuple[Draft, bytes]]:
        """Yield the documents of a unit by its number in signatures/: of an earlier dataset, or
        what the steps leave of a new one."""
        if place < self.first:
            return ((Draft("", ""), text) for text in self.earlier.texts(place))
        return drafts(self.curated / f"{place - self.first:06d}")

    def _reason(self, stays: tuple[int, int]) -> tuple[str, str]:
        """Return the step and the reason for which a document goes, of the one that stays."""
        if stays[0] < self.first:
            return AGAINST, f"is in {self.earlier.name(stays[0])}"
        return NEAR, _NEAR

    def gone(self, number: int) -> dict[int, tuple[int, int]]:
        """Return which documents of a unit go, and for which (unit as in signatures/, document)."""
        if self.near is None:
            return {}
        rows = dropped_of(self.near, number + self.first).tolist()
        return {document: (unit, of) for document, unit, of in rows}

    def _cut(self, number: int) -> dict[int, list[tuple[int, int]]]:
        """Return the passages, in bytes, to cut of a unit's documents."""
        if self.passages is None:
            return {}
        with UnitFile(self.passages / f"{number:06d}") as file:
            rows = file.column(file.facts["offset"], 3 * file.facts["passages"], "<u8")
        cut: dict[int, list[tuple[int, int]]] = {}
        for document, start, stop in rows.reshape(-1, 3).tolist():
            cut.setdefault(document, []).append((start, stop))
        return cut

    def _find_duplicates(self, settings: Settings, phase: Phase) -> None:
        signed, edges = self._folder("signatures"), self._folder("edges")
        self._each_compared(phase, "sign", partial(_sign, self, signed, settings), signed)
        sources = [0] * self.first + [unit.source for unit in self.units]
        every = signatures(signed, sources, settings, self.first)
        job = partial(find_edges, every, edges)
        paths = self._ranges(phase, "find near-duplicates", job, edges, every.keys)
        assert self.near is not None
        task = Task("near-duplicates", resolve, (every, paths, self.near, settings), 0, self.near)
        phase("join near-duplicates", "ranges", len(paths), [task])

    def _find_passages(self, settings: Substrings, phase: Phase) -> None:
        anchors, repeats = self._folder("anchors"), self._folder("repeats")
        job: Any = partial(_anchor, self, anchors, settings)
        self._each_compared(phase, "find passages", job, anchors)
        runs = anchor_runs(anchors, self.first + len(self.units))
        keys = sum(run.anchors for unit in runs for run in unit)
        job = partial(find_repeats, anchors, repeats, runs)
        paths = self._ranges(phase, "find repeated passages", job, repeats, keys)
        folder = self._folder("passages")
        self._each_unit(phase, "cut passages", partial(_passages, self, paths, settings), folder)

    def _folder(self, name: str) -> Path:
        folder = self.work / name
        folder.mkdir(exist_ok=True)
        return folder

    def _each_compared(self, phase: Phase, name: str, job: Any, folder: Path) -> None:
        self._each_unit(phase, name, job, folder, [*self.earlier.units, *self.units])

    def _each_unit(
        self, phase: Phase, name: str, job: Any, folder: Path, units: Sequence[Unit] = ()
    ) -> None:
        units = units or self.units
        tasks = [
            Task(unit.label, job, (number, unit), unit.size, folder / f"{number:06d}")
            for number, unit in enumerate(units)
        ]
        phase(name, "bytes", sum(unit.size for unit in units), tasks)

    def _ranges(self, phase: Phase, name: str, job: Any, folder: Path, keys: int) -> list[Path]:
        """Run a job for each range of keys; return its files."""
        bounds = range_edges(keys)
        paths = [folder / f"{i:04d}" for i in range(len(bounds) - 1)]
        tasks = [
            Task(f"{name}, range {i + 1} of {len(paths)}", job, (i, low, high), 0, paths[i])
            for i, (low, high) in enumerate(pairwise(bounds))
        ]
        phase(name, "keys", keys, tasks)
        return paths


def _count(across: Across, number: int, unit: Unit, tick: Tick) -> None:
    if not finished(path := across.counted / f"{number:06d}"):
        with UnitWriter(path) as out:
            out.finish({"tally": across.tally(number).as_dict()})
    tick(unit.size, 0)


def _sign(
    across: Across, folder: Path, settings: Settings, number: int, unit: Unit, tick: Tick
) -> None:
    if not finished(path := folder / f"{number:06d}"):
        scores: list[float] = []

        def texts() -> Iterator[str]:
            for draft, text in across.compared(number):
                score = draft.attributes.get(_SCORE, np.nan)
                scores.append(score if isinstance(score, float) else np.nan)
                yield text.decode()

        with UnitWriter(path) as out:
            out.finish(sign_unit(texts(), out, settings, scores))
    tick(unit.size, 0)


def _anchor(
    across: Across, folder: Path, settings: Substrings, number: int, unit: Unit, tick: Tick
) -> None:
    if not finished(path := folder / f"{number:06d}"):
        with UnitWriter(path) as out:
            out.finish(anchor_unit(_remaining(across, number), out, settings))
    tick(unit.size, 0)


def _passages(
    across: Across,
    ranges: Sequence[Path],
    settings: Substrings,
    number: int,
    unit: Unit,
    tick: Tick,
) -> None:
    assert across.passages is not None
    if not finished(path := across.passages / f"{number:06d}"):
        place = number + across.first
        every = cut_unit(_remaining(across, place), place, ranges, across.texts(), settings)
        rows = [(place, *span) for place, spans in enumerate(every) for span in spans]
        with UnitWriter(path) as out:
            offset = out.add(np.array(rows, "<u8").reshape(-1, 3))
            out.finish({"passages": len(rows), "offset": offset})
    tick(unit.size, 0)


def _remaining(across: Across, number: int) -> Iterator[str | None]:
    """Yield the texts of a unit, by its number in anchors/, before passages are cut; None for those
    that go."""
    gone = across.gone(number - across.first) if number >= across.first else {}
    for place, (_, text) in enumerate(across.compared(number)):
        yield None if place in gone else text.decode()
