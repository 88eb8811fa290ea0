"""The page of a campaign: each trial's answer, its gains, its evidence, and the log it rests on.

Invariant: the numbers of the log; the same log gives the same bytes.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from forescale.ground.storage import write_output
from forescale.pages import document
from forescale.pages import figure as chart
from forescale.pages.document import Cell, Section, code, number, percent, render
from forescale.trials.answer import Answer
from forescale.trials.campaign import Campaign
from forescale.trials.verdict import LEVEL

_COLOURS = {"better": "#2ca02c", "no better": "#7f7f7f"}
_OPEN = "#1f77b4"
_STAGES = {"first": "First seeds", "fresh": "Fresh seeds", "larger": "Larger size"}
_SHADES = {"first": "#7f7f7f", "fresh": "#1f77b4", "larger": "#9467bd"}
_FACTORS = ("compute", "seconds", "memory")
_NARROW = ("trial", "answer", "gain", "pairs", "compute")  # and the interval, in a terminal


def write(campaign: Campaign, answers: Sequence[Answer], path: Path) -> None:
    """Write the page of a campaign."""
    facts = campaign.ledger.rows[0]
    base = " ".join(facts["base"]) or "the defaults of forescale train"
    counts = {word: sum(a.word == word for a in answers) for word in {a.word for a in answers}}
    intro = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    plural = f"{len(answers)} trials" if len(answers) != 1 else "1 trial"
    lead: list[Cell] = [f"Base: {base}."]
    sections = [table_of(answers), _gains(answers), *(_trial(a) for a in answers), _log(campaign)]
    html = render(
        title=f"Campaign {campaign.folder.name}", intro=f"{plural}: {intro}.",
        lead=lead, sections=sections,
    )  # fmt: skip
    write_output(path, html.encode())


def table_of(answers: Sequence[Answer]) -> Section:
    """Return the leaderboard: the answers, the best gain first."""
    head = ["trial", "attempt", "answer", "gain", f"{LEVEL:.0%} at any time", "pairs"]
    rows: list[list[Cell]] = [[*head, *_FACTORS, "FLOPs"]]
    order = {"better": 0, "not yet known": 1, "no better": 2}
    gain = lambda a: -a.verdict.gain if a.verdict else 0.0  # noqa: E731
    for a in sorted(answers, key=lambda a: (order.get(a.word, 3), gain(a))):
        v = a.verdict
        ends = "-"
        if v and all(map(math.isfinite, v.ends)):
            ends = f"{v.ends[0]:+.2%} to {v.ends[1]:+.2%}"
        factors = [f"{a.factors[n].value:.3g}" if n in a.factors else "-" for n in _FACTORS]
        pairs = "+".join(str(v.pairs) for v in a.verdicts.values()) or "0"
        rows.append([a.row["name"], str(a.row["number"]), a.word,
                     percent(v.gain, sign="+") if v else "-", ends, pairs, *factors,
                     number(a.flops, 3)])  # fmt: skip
    return Section(
        "trials", "Trials", rows=rows, head=True,
        after=[
            "Gain: of log loss, base over change, of pairs with one seed and one order of the "
            "text. Pairs: of the first seeds + fresh seeds + larger size. Compute, seconds, "
            "memory: what the base would need over what the change needs; compute by longer "
            "training of the base."
        ],
    )  # fmt: skip


def show(answers: Sequence[Answer], console: Console) -> None:
    """Print the leaderboard, without the columns that a terminal of 80 has no room for: of a table
    that is too wide, it would leave out whole columns, the answers among them."""
    section = table_of(answers)
    head = section.rows[0]
    narrow = [i for i, name in enumerate(head) if name in _NARROW or "any time" in str(name)]
    section.rows = [[row[i] for i in narrow] for row in section.rows]
    section.after = []
    document.show(console, [section])


def _gains(answers: Sequence[Answer]) -> Section:
    """Return the picture of all gains with their intervals."""
    counted = [a for a in answers if a.verdict and all(map(math.isfinite, a.verdict.ends))]
    section = Section("gains", "Gains")
    if not counted:
        section.absent = "No trial has two pairs yet."
        return section
    every = [x for a in counted if a.verdict for x in a.verdict.ends]
    low, high = min(0.0, *every), max(0.0, *every)
    room = 0.05 * (high - low)
    figure = chart.Figure(
        chart.Axis("gain of the loss", percent=True, zero=True, ends=(low - room, high + room)),
        chart.ordinal("", [str(a.row["name"]) for a in counted], down=True),
        height=90 + 34 * len(counted),
    )
    for i, a in enumerate(counted):
        assert a.verdict is not None
        colour = _COLOURS.get(a.word, _OPEN)
        ends, at = np.array(a.verdict.ends), np.array([i, i])
        figure.add(
            chart.line(ends, at, colour, name=a.word),
            chart.dots(np.array([a.verdict.gain]), np.array([i]), [colour], [f"{a.row['name']}"]),
        )
    caption = f"Mean gain of each trial, and its {LEVEL:.0%} confidence sequence."
    section.pictures = [("gains", figure, caption)]
    return section


def _trial(a: Answer) -> Section:
    """Return the section of one trial: its pairs as dots, and what was decided."""
    name = str(a.row["name"])
    section = Section(f"trial-{a.row['number']}", f"{name}: {a.word}")
    section.rows = [
        ["Change", code(" ".join(a.row["change"]))],
        *([key, f"{old} → {new}"] for key, (old, new) in a.row["keys"].items()),
        ["Answer", f"{a.word} ({a.why})"],
        ["Needed", f"an e-value of {a.row['threshold']:.4g}, as attempt {a.row['number']}"],
        *([_STAGES[stage], str(v)] for stage, v in a.verdicts.items()),
        *([f"Factor of {noun}", str(f)] for noun, f in a.factors.items()),
    ]
    if a.predicted is not None:
        section.rows.append(["Predicted at the larger size", percent(a.predicted["gain"])])
    if a.verdicts:
        figure = chart.Figure(
            chart.Axis("pair"), chart.Axis("gain of the loss", percent=True, zero=True), height=260
        )
        start = 0
        for stage, v in a.verdicts.items():
            x = np.arange(1, v.pairs + 1) + start
            start += v.pairs
            texts = [
                f"{stage}, pair {i - x[0] + 1}\n{gain:+.3%}"
                for i, gain in zip(x, v.gains, strict=True)
            ]
            figure.add(chart.dots(x.astype(float), np.array(v.gains), [_SHADES[stage]], texts))
        section.key = [(_STAGES[stage], _SHADES[stage]) for stage in a.verdicts]
        section.pictures = [(f"pairs-{a.row['number']}", figure, "The gain of each pair.")]
    return section


def _log(campaign: Campaign) -> Section:
    """Return where the numbers come from, with the last hash of the log."""
    flops, seconds, runs = campaign.spent()
    return Section(
        "log", "The log",
        rows=[
            ["Rows", str(len(campaign.ledger.rows))],
            ["Last hash", code(campaign.ledger.head)],
            ["Runs", str(runs)],
            ["FLOPs", number(flops, 4)],
            ["Hours", number(seconds / 3600, 3)],
        ],
        after=["Each row holds the hash of the one before it. Attempts that were stopped, that "
               "failed or that were no better are in it, and count in what a later one needs."],
    )  # fmt: skip
