"""What a curation does across documents, once each has gone through the steps: near-duplicates go,
and passages that occurred before are cut.

    signatures/000012   a unit's keys           edges/0003     equal keys of a range
    near                all documents that go, and for which
    anchors/000012      a unit's passages       repeats/0003   those of a range that occurred before
    passages/000012     what is cut of a unit      counted/000012   its tally

Invariant: the documents that remain depend on the documents, their order and the settings alone.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from forescale.data.curate.curation import Curation
from forescale.data.curate.duplicates import (
    Duplicates,
    dropped_of,
    find_edges,
    resolve,
    sign_unit,
    signatures,
)
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

NEAR, PASSAGES = "near_duplicates", "repeated_passages"
_NEAR, _NOTHING = "near-duplicate", "nothing left"  # reasons
_SCORE = "score"  # the attribute of the rule `score`
Phase = Callable[[str, str, int, Sequence[Task]], None]


class Across:
    """The files of these phases in the work directory of a build; `run` makes them."""

    def __init__(self, work: Path, curated: Path, curation: Curation, units: Sequence[Unit]):
        self.work, self.curated, self.curation, self.units = work, curated, curation, units
        self.near = work / "near" if curation.near is not None else None
        self.passages = work / "passages" if curation.passages is not None else None

    @property
    def counted(self) -> Path:
        """The directory whose files have the tallies of units."""
        return self.work / "counted" if self.near or self.passages else self.curated

    def run(self, phase: Phase) -> None:
        """Make what the settings ask for. phase: runs tasks, given its name, unit and total."""
        if self.curation.near is not None:
            self._find_duplicates(self.curation.near, phase)
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
                text, reason = b"", _NEAR
            elif place in cut:
                text = without(text.decode(), cut[place]).encode()
                reason = "" if text and not text.isspace() else _NOTHING
            yield draft, text, reason

    def tally(self, number: int) -> Tally:
        """Return the tally of a unit: of its steps, and of what goes and is cut afterwards."""
        tally = Tally(**facts(self.curated / f"{number:06d}")["tally"])
        for name, path in ((NEAR, self.near), (PASSAGES, self.passages)):
            if path is not None:
                tally.step(name)
        gone = self.gone(number)
        every = zip(drafts(self.curated / f"{number:06d}"), self.read(number), strict=True)
        for place, ((draft, raw), (_, text, reason)) in enumerate(every):
            before, draft.text = raw.decode(), text.decode()
            if self.near is not None:
                tally.arrived(NEAR, len(raw))
            if place in gone:
                draft.text = before
                tally.dropped(NEAR, reason, draft, len(raw), stays=gone[place])
                continue
            if self.passages is not None:
                tally.arrived(PASSAGES, len(raw))
            if reason:
                draft.text = before
                tally.dropped(PASSAGES, reason, draft, len(raw))
                continue
            if text != raw:
                tally.changed(PASSAGES, before, draft)
            tally.remains(draft, len(text))
        tally.fill(Texts(self.curated))
        return tally

    def gone(self, number: int) -> dict[int, tuple[int, int]]:
        """Return which documents of a unit go, and for which (unit, document)."""
        if self.near is None:
            return {}
        return {d: (unit, of) for d, unit, of in dropped_of(self.near, number).tolist()}

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

    def _find_duplicates(self, settings: Duplicates, phase: Phase) -> None:
        signed, edges = self._folder("signatures"), self._folder("edges")
        self._each_unit(phase, "sign", partial(_sign, self.curated, signed, settings), signed)
        every = signatures(signed, [unit.source for unit in self.units], settings)
        job = partial(find_edges, every, edges)
        paths = self._ranges(phase, "find near-duplicates", job, edges, every.keys)
        assert self.near is not None
        task = Task("near-duplicates", resolve, (every, paths, self.near, settings), 0, self.near)
        phase("join near-duplicates", "ranges", len(paths), [task])

    def _find_passages(self, settings: Substrings, phase: Phase) -> None:
        anchors, repeats = self._folder("anchors"), self._folder("repeats")
        self._each_unit(phase, "find passages", partial(_anchor, self, anchors, settings), anchors)
        runs = anchor_runs(anchors, len(self.units))
        keys = sum(run.anchors for unit in runs for run in unit)
        job = partial(find_repeats, anchors, repeats, runs)
        paths = self._ranges(phase, "find repeated passages", job, repeats, keys)
        folder = self._folder("passages")
        self._each_unit(phase, "cut passages", partial(_passages, self, paths, settings), folder)

    def _folder(self, name: str) -> Path:
        folder = self.work / name
        folder.mkdir(exist_ok=True)
        return folder

    def _each_unit(self, phase: Phase, name: str, job: Any, folder: Path) -> None:
        tasks = [
            Task(unit.label, job, (number, unit), unit.size, folder / f"{number:06d}")
            for number, unit in enumerate(self.units)
        ]
        phase(name, "bytes", sum(unit.size for unit in self.units), tasks)

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
    curated: Path, folder: Path, settings: Duplicates, number: int, unit: Unit, tick: Tick
) -> None:
    if not finished(path := folder / f"{number:06d}"):
        scores: list[float] = []

        def texts() -> Iterator[str]:
            for draft, text in drafts(curated / f"{number:06d}"):
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
        texts = _remaining(across, number)
        every = cut_unit(texts, number, ranges, Texts(across.curated), settings)
        rows = [(place, *span) for place, spans in enumerate(every) for span in spans]
        with UnitWriter(path) as out:
            offset = out.add(np.array(rows, "<u8").reshape(-1, 3))
            out.finish({"passages": len(rows), "offset": offset})
    tick(unit.size, 0)


def _remaining(across: Across, number: int) -> Iterator[str | None]:
    """Yield the texts of a unit before passages are cut; None for near-duplicates."""
    gone = across.gone(number)
    for place, (_, text) in enumerate(drafts(across.curated / f"{number:06d}")):
        yield None if place in gone else text.decode()
