"""The first phase of a curated build: each unit of the source goes through the steps once, and the
text that they keep is stored in the work directory, compressed, for all later phases.

    curated/000012    blocks of text (stored.py); facts: blocks, tally, attributes, report of what
                      was left out

Invariant: the documents of Curated are those that the steps keep of the source's, in source order;
each that is dropped is in its tally and its report.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forescale.data.curate.across import Across
from forescale.data.curate.curation import Curation
from forescale.data.curate.step import Draft
from forescale.data.curate.stored import Blocks
from forescale.data.curate.tally import Tally
from forescale.data.prepare.columns import UnitWriter, facts, finished
from forescale.data.prepare.pool import Tick
from forescale.data.text.documents import Document, DocumentSource, ReadingReport, Unit


def curate_unit(
    source: DocumentSource, curation: Curation, directory: Path, number: int, unit: Unit, tick: Tick
) -> None:
    """Put the documents of a unit through the steps; write its file in `directory`."""
    if finished(path := directory / f"{number:06d}"):
        tick(unit.size, 0)
        return
    report, tally = ReadingReport(), Tally(curation.samples)
    steps = [*zip(curation.names, curation.steps, strict=True)]
    for name in curation.names:
        tally.step(name)
    raw, left = hashlib.sha256(), unit.size
    kinds: dict[str, bool] = {}
    with UnitWriter(path) as out:
        blocks = Blocks(out)
        for document in source.read(unit, report):
            raw.update(b"%d\n" % len(document.text))
            raw.update(document.text)
            tally.read(len(document.text))
            draft = Draft(document.name, document.text.decode("utf-8"), document.url)
            if text := _through(steps, draft, tally, report):
                if not curation.compares:  # else it may still go
                    tally.remains(draft, len(text))
                blocks.add(draft, text)
                _add_kinds(kinds, {k: isinstance(v, str) for k, v in draft.attributes.items()})
            step = min(left, len(document.text))
            left -= step
            tick(step, 0)
        tick(left, 0)
        out.finish(
            {
                "blocks": blocks.finish(),
                "raw": raw.hexdigest(),
                "tally": tally.as_dict(),
                "attributes": kinds,
                "report": asdict(report),
            }
        )


def _add_kinds(kinds: dict[str, bool], others: dict[str, bool]) -> None:
    for name, is_text in others.items():
        kinds[name] = is_text or kinds.get(name, False)


def _through(
    steps: list[tuple[str, Any]], draft: Draft, tally: Tally, report: ReadingReport
) -> bytes | None:
    """Return the text that the steps leave of a document; None if one drops it."""
    size = len(draft.text.encode())
    for name, step in steps:
        before = draft.text
        tally.arrived(name, size)
        reason = step(draft)
        if reason is None and draft.text is not before and draft.text != before:
            if draft.text and not draft.text.isspace():
                size = len(draft.text.encode("utf-8", "replace"))
                tally.changed(name, before, draft)
            else:
                draft.text, reason = before, "nothing left"
        if reason is not None:
            tally.dropped(name, reason, draft, size)
            report.add(f"{name}: {reason}", draft.name)
            return None
    return draft.text.encode("utf-8", "replace")


@dataclass
class Curated:
    """A source of the documents that a curation keeps of another source (DocumentSource)."""

    source: DocumentSource
    curation: Curation
    across: Across
    numbers: dict[Unit, int]
    sources: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.sources = self.source.sources

    def units(self) -> list[Unit]:
        return [*self.numbers]

    def read(self, unit: Unit, report: ReadingReport) -> Iterator[Document]:
        number = self.numbers[unit]
        stored = facts(self.across.curated / f"{number:06d}")
        report.merge(ReadingReport(**stored["report"]))
        for draft, text, reason in self.across.read(number):
            if reason:
                report.add(reason, draft.name)
            else:
                yield Document(draft.name, text, draft.url, draft.attributes)

    def state(self) -> Iterator[tuple[Any, ...]]:
        yield from self.source.state()

    def describe(self) -> dict[str, Any]:
        return {**self.source.describe(), "curation": self.curation.describe()}


def attributes_of(directory: Path, count: int) -> dict[str, bool]:
    """Return the attributes that documents of a build have, and of each whether it is a text."""
    kinds: dict[str, bool] = {}
    for number in range(count):
        _add_kinds(kinds, facts(directory / f"{number:06d}")["attributes"])
    return kinds


def tally_of(directory: Path, count: int) -> Tally:
    """Return the tally of all units of a build. Raises UserError if a file is damaged."""
    total = Tally(0)
    for number in range(count):
        stored = facts(directory / f"{number:06d}")["tally"]
        total.samples_wanted = stored["samples_wanted"]
        total.merge(Tally(**stored))
    return total
