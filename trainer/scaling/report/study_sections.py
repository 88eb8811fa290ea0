"""The sections of a report that a study has beside its law: forecasts, basins, noise, costs.

Invariant: a section is there where there is something to show, and has its numbers as a table.
"""

import math
from collections.abc import Mapping

from markupsafe import Markup

from forescale.scaling.analysis.forecast import Score
from forescale.scaling.design.noise import Level, Spread
from forescale.scaling.report import study_figures as figures
from forescale.scaling.report.evidence import Cross, Evidence, Stage
from forescale.scaling.report.sections import Cell, Section, flops_key, number, percent, span

Shades = Mapping[float, str]


def sections(seen: Evidence, shades: Shades) -> list[Section]:
    """Those that there is something for, in the order of the page. shades: of budgets."""
    found = []
    if seen.cards:
        found.append(_forecasts(seen))
    if seen.crosses or seen.checks:
        found.append(_basin(seen, shades))
    if seen.noise.levels:
        found.append(_noise(seen))
    if any(s.seconds for s in seen.stages):
        found.append(_costs(seen))
    return found


def _forecasts(seen: Evidence) -> Section:
    made, n = seen.score, len(seen.cards)
    assert made is not None
    level = f"{seen.cards[0].facts['level']:.0%}"
    rows: list[list[Cell]] = [["card", "run", "foretold", level, "came out", "error", "written"]]
    for card in seen.cards:
        f, outcome = card.facts, card.outcome
        out: list[Cell] = ["awaited", ""]
        if outcome:
            out = [number(outcome["loss"]), percent(outcome["loss"] / f["loss"] - 1, sign="+")]
        name = f["target"]["run"]
        rows.append([card.id, name, number(f["loss"]), span(f["interval"]), *out, f["time"]])
    return Section(
        "forecasts", "Forecasts, and what came out", [
            ("forecast-cards", figures.forecasts(seen.cards),
             f"A line a run that was foretold before it began. Pale: the interval of {level}, "
             "dark: that of 50%, both over the loss that was foretold. Dot: what came out; orange "
             f"diamond: outside of the {level}; hollow: it hasn't come out. {_score(made, n)}"),
        ], rows, head=True,
        after=["Each card holds the hash of the one before it; the chain is whole. Error: observed "
               "over foretold."],
        rests=f"From {n} card{'s' * (n != 1)}, written before their runs had a record.",
    )  # fmt: skip


def _score(made: Score, cards: int) -> str:
    """In words: coverage and skill."""
    out = len(made.errors)
    if not out:
        return f"None of {cards} came out so far."
    rivals = ", ".join(f"{name} {x:+.2f}".replace("-", "−") for name, x in made.skill.items())
    skill = f" Skill, 1 − our mean absolute error over theirs, against {rivals}." if rivals else ""
    return (
        f"{out} of {cards} came out: {made.inside} inside, {made.inside_50} inside of the 50%; "
        f"interval score {made.interval_score:.4g}.{skill}"
    )


def _basin(seen: Evidence, shades: Shades) -> Section:
    section = Section("basin", "The basin of learning rate and batch", head=True)
    section.key = flops_key({b: c for b, c in shades.items() if b in _budgets(seen)})
    of_rates = figures.basin(seen.crosses, "learning rate", shades) if seen.crosses else (
        "No cell has three learning rates yet.")  # fmt: skip
    section.pictures = [("basin-rate", of_rates, "")]
    if seen.checks:
        made = figures.basin(seen.checks, "batch", shades)
        section.pictures.append(("basin-batch", made, ""))
    name, picture, _ = section.pictures[-1]
    section.pictures[-1] = (
        name, picture,
        "A line a cell: the parabola through its best run and the neighbours, in logarithms; solid "
        "for the smallest size of a stage, dashed for larger ones; thin and straight beyond it. "
        "Hollow: a best run at the edge of what was tried, which is no optimum. A cross on top: it "
        "diverged.",
    )  # fmt: skip
    section.rows = [["cell", "tried", "N", "D", "runs", "from", "to", "best", "left", "inside"]]
    for what, found in (("rate", seen.crosses), ("batch", seen.checks)):
        section.rows += [_row(what, c) for c in found]
    section.after = [*_edges(seen), *_gap(seen)]
    n = sum(len(c.values) for c in (*seen.crosses, *seen.checks))
    section.rests = f"From {n} runs of {_cells(len(seen.crosses) + len(seen.checks))}."
    return section


def _budgets(seen: Evidence) -> set[float | None]:
    return {c.budget for c in (*seen.crosses, *seen.checks)}


def _row(what: str, c: Cross) -> list[Cell]:
    left = "" if c.gap is None else percent(c.gap)
    ends = [number(c.values[0], 3), number(c.values[-1], 3)]
    best, inside = number(c.best, 3), "yes" if c.inside else "no"
    size: list[Cell] = [number(c.parameters), number(c.tokens)]
    return [c.cell, what, *size, str(len(c.values)), *ends, best, left, inside]


def _edges(seen: Evidence) -> list[Cell]:
    found: list[Cell] = []
    for what, crosses in (("learning rates", seen.crosses), ("batches", seen.checks)):
        for c in crosses:
            if not c.inside:
                found.append(
                    Markup("{}: the best of {} {}, {}, is at the edge of what was tried: it is no "
                           "optimum.").format(c.cell, len(c.values), what, number(c.best, 3))
                )  # fmt: skip
            if gone := sum(math.isinf(x) for x in c.losses):
                found.append(f"{c.cell}: {gone} of {len(c.values)} {what} diverged.")
    return found


def _gap(seen: Evidence) -> list[Cell]:
    if seen.noise.gap is None:
        return []
    told = "Left to the learning rate in log loss, root mean square of {} crosses: {}."
    return [Markup(told).format(seen.noise.crosses, percent(seen.noise.gap))]


def _noise(seen: Evidence) -> Section:
    levels = seen.noise.levels
    rows: list[list[Cell]] = [["cell", "C", "runs", "all seeds", "weights", "data"]]
    rows += [_level(level) for level in levels]
    n = sum(level.runs for level in levels)
    return Section(
        "noise", "What a seed does", [
            ("repeats", figures.repeats(seen.records, levels),
             "Runs that differ by their seed alone. Black dot: the cell itself; blue square: begun "
             "with other weights; orange diamond: other order of the data."),
        ], rows, head=True,
        after=["Standard deviation of log loss, with the degrees of freedom that it is from; all "
               "seeds: of a run that is new in both."],
        rests=f"From {n} runs of {_cells(len(levels))}.",
    )  # fmt: skip


def _level(level: Level) -> list[Cell]:
    spreads = [_spread(s) for s in (level.noise, level.weights, level.data)]
    return [level.cell, number(level.flops, 3), str(level.runs), *spreads]


def _spread(s: Spread | None) -> Cell:
    return Markup("{} ({})").format(percent(s.sd), s.free) if s else "not known"


def _costs(seen: Evidence) -> Section:
    stages = [s for s in seen.stages if s.seconds]
    rows: list[list[Cell]] = [
        ["stage", "budget", "cells ended", "FLOPs spent", "planned", "device-hours", "ETTR"]
    ]
    rows += [_stage(s) for s in seen.stages]
    spent = sum(s.spent for s in seen.stages if not s.aside)
    share = percent(spent / seen.cap, 1) if seen.cap else ""
    total = Markup("Spent {} of the cap of {} FLOPs ({}){}.").format(
        number(spent, 4), number(seen.cap, 4), share,
        ", the target aside" if any(s.aside for s in seen.stages) else "",
    )  # fmt: skip
    words = ", ".join(f"{n} {word}" for word, n in seen.words.items())
    buckets = figures.buckets_of(stages)
    return Section(
        "costs", "What it cost, and where the time went", [
            ("goodput", figures.hours(stages),
             "Of the wall clocks of a stage's runs, from each first start to its last end. Compute "
             "is of steps that were kept; its share is the ETTR, the effective training time "
             "ratio."),
        ], rows, head=True, key=[(b, figures.hue(b)) for b in buckets],
        after=[total, f"Cells: {words}.",
               "FLOPs: lost steps included, a branch from where it left its trunk. Device-hours: "
               "of complete runs, hours of each launch times its ranks."],
        rests=f"From the rows of {_cells(sum(s.ended for s in seen.stages))} that ended, and of "
              "those that are running.",
    )  # fmt: skip


def _stage(s: Stage) -> list[Cell]:
    planned = number(s.low, 3) if s.low == s.high else span((s.low, s.high), 3)
    hours: Cell = "not known" if s.device_hours is None else number(s.device_hours, 3)
    budget: Cell = "the target" if s.aside else number(s.budget, 3) if s.budget else ""
    ettr: Cell = "" if s.ettr is None else percent(s.ettr, 1)
    spent = number(s.spent, 3) if s.spent else "0"
    ended = f"{s.ended} of {s.cells}"
    return [str(s.number), budget, ended, spent, planned, hours, ettr]


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"
