"""The page of a curated dataset: how documents and bytes went through the steps, and what each step
changed and dropped, so that a person can judge a filter by eye."""

from typing import Any

import numpy as np
from markupsafe import Markup

from forescale.data.dataset import Dataset
from forescale.ground.errors import UserError
from forescale.pages.document import Cell, Section, percent, render, whole
from forescale.pages.figure import OTHER, TARGET, Axis, Figure, Trace

_ROWS = 30  # languages and domains
_TEXT = 600  # characters of a sample


def page(dataset: Dataset) -> str:
    """Return the page as HTML. Raises UserError if the dataset had no curation."""
    if (counts := dataset.curation) is None:
        todo = "build it with one: forescale shards INPUT output=DIR curate=web"
        raise UserError(dataset.where, "had no curation, so there is nothing to show", todo)
    sections = [
        _flow(counts),
        _lengths(counts),
        _table("languages", "Languages", "language", counts["languages"]),
        _table("domains", "Domains", "domain", counts["domains"]),
        *_samples(counts),
    ]
    read, remaining = (sum(row) for row in counts["lengths"])
    intro = f"{remaining:,} of {read:,} documents remain."
    return render(title=f"Curation of {dataset.path}", sections=sections, intro=intro)


def _flow(counts: dict[str, Any]) -> Section:
    head: list[Cell] = ["step", "documents in", "bytes in", "changed", "bytes off", "dropped",
                        "share", "bytes dropped"]  # fmt: skip
    rows: list[list[Cell]] = [head]
    for name, step in counts["steps"].items():
        (documents, size), (changed, off) = step["read"], step["changed"]
        gone = [sum(pair[i] for pair in step["dropped"].values()) for i in range(2)]
        numbers = (documents, size, changed, off, gone[0])
        share = percent(gone[0] / documents) if documents else "-"
        rows.append([Markup("<b>{}</b>").format(name), *map(whole, numbers), share, whole(gone[1])])
        for reason, (dropped, bytes_) in sorted(
            step["dropped"].items(), key=lambda item: (-item[1][0], item[0])
        ):
            share = percent(dropped / documents)
            rows.append([f"· {reason}", "", "", "", "", whole(dropped), share, whole(bytes_)])
    note = "Each row reads what the row above it kept. Exact duplicates go afterwards."
    return Section("flow", "What each step did", rows=rows, head=True, after=[note])


def _lengths(counts: dict[str, Any]) -> Section:
    figure = Figure(Axis("bytes of a document", log=True), Axis("documents"), height=280)
    for row, colour, name in zip(counts["lengths"], (OTHER, TARGET), ("read", "kept"), strict=True):
        last = max((i for i, n in enumerate(counts["lengths"][0]) if n), default=0) + 1
        x = np.exp2(np.arange(last) + 0.5)
        figure.add(Trace("line", x, np.array(row[:last], float), (colour,), name=name))
    key = [("read", OTHER), ("kept", TARGET)]
    caption = "Documents between one power of two and the next."
    return Section("lengths", "Lengths", pictures=[("lengths", figure, caption)], key=key)


def _table(name: str, title: str, label: str, table: dict[str, list[int]]) -> Section:
    """Return a section of the most frequent values of an attribute."""
    if not table:
        return Section(name, title, absent=f"No step or input gave a {label}.")
    ordered = sorted(table.items(), key=lambda item: (-sum(item[1]), item[0]))
    rows: list[list[Cell]] = [[label, "kept", "dropped", "share kept"]]
    for value, (remaining, dropped) in ordered[:_ROWS]:
        rows.append(
            [
                value or "-",
                whole(remaining),
                whole(dropped),
                percent(remaining / (remaining + dropped)),
            ]
        )
    rest = len(ordered) - _ROWS
    after: list[Cell] = [f"And {rest:,} more."] if rest > 0 else []
    return Section(name, title, rows=rows, head=True, after=after)


def _samples(counts: dict[str, Any]) -> list[Section]:
    """Return a section for each step and reason, with texts that it changed or dropped."""
    sections = []
    for number, (kind, samples) in enumerate(sorted(counts["samples"].items())):
        texts: list[Cell] = []
        between = " became " if kind.endswith(": changed") else " goes for "
        for _, name, *parts in samples:
            blocks = [Markup("<pre>{}</pre>").format(part[:_TEXT]) for part in parts]
            texts.append(Markup("<b>{}</b>{}").format(name, Markup(between).join(blocks)))
        sections.append(Section(f"samples-{number}", kind, after=texts))
    return sections
