"""The sections of a study's report besides the law: forecasts, sweeps, noise, costs.

Invariant: a section is there only if it has something to show, and has its numbers as a table.
"""

import math
from collections.abc import Mapping

from markupsafe import Markup

from forescale.pages.document import Cell, Section, number, percent, span
from forescale.scaling.analysis.forecast import Score
from forescale.scaling.design.noise import Level, Spread
from forescale.scaling.report import study_figures as figures
from forescale.scaling.report.evidence import StageCost, StudyEvidence, SweepResponse
from forescale.scaling.report.fit_figures import Picture, flops_key
from forescale.scaling.report.fit_text import forecast_rows

Shades = Mapping[float, str]


def sections(evidence: StudyEvidence, shades: Shades) -> list[Section]:
    """Return the sections with content, in the order of the page. shades: colours of the
    budgets."""
    sections_of = []
    if evidence.forecasts:
        sections_of.append(_forecasts(evidence))
    if evidence.rate_sweeps or evidence.batch_sweeps:
        sections_of.append(_response(evidence, shades))
    if evidence.noise.levels:
        sections_of.append(_noise(evidence))
    if any(s.seconds for s in evidence.stages):
        sections_of.append(_costs(evidence))
    return sections_of


def _forecasts(evidence: StudyEvidence) -> Section:
    scored, n = evidence.score, len(evidence.forecasts)
    assert scored is not None
    level = f"{evidence.forecasts[0].facts['level']:.0%}"
    return Section(
        "forecasts", "Forecasts and observed losses", [
            ("forecast-errors", figures.forecasts(evidence.forecasts),
             f"Each line is a run that was predicted before it started. Pale: the {level} "
             "interval; dark: the 50% interval, both relative to the predicted loss. Dot: the "
             f"observed loss; orange diamond: it is outside the {level} interval; hollow: it is "
             f"not known yet. {_score(scored, n)}"),
        ], forecast_rows(evidence.forecasts), head=True,
        after=["Each forecast contains the hash of the one before it, and this chain is intact. "
               "To predicted: observed loss relative to predicted loss."],
        rests=f"From {n} forecast{'s' * (n != 1)}, written before their runs had a record.",
    )  # fmt: skip


def _score(scored: Score, count: int) -> str:
    """Coverage and skill of `count` forecasts, as sentences."""
    out = len(scored.errors)
    if not out:
        return f"None of {count} forecasts has an observed loss yet."
    rivals = ", ".join(f"{name} {x:+.2f}".replace("-", "−") for name, x in scored.skill.items())
    text = "Skill (1 − mean absolute error relative to a simpler prediction)"
    skill = f" {text}: {rivals}." if rivals else ""
    return (
        f"{out} of {count} forecasts have an observed loss: {scored.inside} inside the interval, "
        f"{scored.inside_50} inside the 50% interval. "
        f"Interval score {scored.interval_score:.4g}.{skill}"
    )


def _response(evidence: StudyEvidence, shades: Shades) -> Section:
    section = Section("response", "Sweeps of learning rate and batch", head=True)
    section.key = flops_key({b: c for b, c in shades.items() if b in _budgets(evidence)})
    of_rates: Picture = "No cell has been run at three learning rates yet."
    if evidence.rate_sweeps:
        of_rates = figures.sweep_responses(evidence.rate_sweeps, "learning rate", shades)
    section.pictures = [("response-rate", of_rates, "")]
    if evidence.batch_sweeps:
        of_batches = figures.sweep_responses(evidence.batch_sweeps, "batch", shades)
        section.pictures.append(("response-batch", of_batches, ""))
    name, picture, _ = section.pictures[-1]
    section.pictures[-1] = (
        name, picture,
        "Each line is one cell: the parabola through its best run and the neighbours, in "
        "logarithms, and thin straight lines beyond it. Solid: the smallest size of a stage; "
        "dashed: larger ones. Hollow: the best run is at the edge of its sweep and no optimum. A "
        "cross at the top: the run diverged.",
    )  # fmt: skip
    section.rows = [
        ["cell", "sweep", "N", "D", "runs", "from", "to", "best", "gap", "optimum inside"]
    ]
    for name, sweeps in (("learning rate", evidence.rate_sweeps), ("batch", evidence.batch_sweeps)):
        section.rows += [_row(name, c) for c in sweeps]
    section.after = [*_edges(evidence), *_gap(evidence)]
    n = sum(len(c.values) for c in (*evidence.rate_sweeps, *evidence.batch_sweeps))
    section.rests = (
        f"From {n} runs of {_cells(len(evidence.rate_sweeps) + len(evidence.batch_sweeps))}."
    )
    return section


def _budgets(evidence: StudyEvidence) -> set[float | None]:
    return {c.budget for c in (*evidence.rate_sweeps, *evidence.batch_sweeps)}


def _row(name: str, c: SweepResponse) -> list[Cell]:
    left = "" if c.gap is None else percent(c.gap)
    ends = [number(c.values[0], 3), number(c.values[-1], 3)]
    best, inside = number(c.best, 3), "yes" if c.inside else "no"
    size: list[Cell] = [number(c.parameters), number(c.tokens)]
    return [c.cell, name, *size, str(len(c.values)), *ends, best, left, inside]


def _edges(evidence: StudyEvidence) -> list[Cell]:
    notes: list[Cell] = []
    for name, sweeps in (
        ("learning rates", evidence.rate_sweeps),
        ("batches", evidence.batch_sweeps),
    ):
        for c in sweeps:
            if not c.inside:
                notes.append(
                    Markup("{}: the best of {} {}, {}, is at the edge of the sweep; it is no "
                           "optimum.").format(c.cell, len(c.values), name, number(c.best, 3))
                )  # fmt: skip
            if gone := sum(math.isinf(x) for x in c.losses):
                notes.append(f"{c.cell}: {gone} of {len(c.values)} {name} diverged.")
    return notes


def _gap(evidence: StudyEvidence) -> list[Cell]:
    if evidence.noise.gap is None:
        return []
    text = (
        "Gap: log loss by which the best run is above the minimum of its parabola. Root mean "
        "square of {} learning-rate sweeps: {}."
    )
    return [Markup(text).format(evidence.noise.sweeps, percent(evidence.noise.gap))]


def _noise(evidence: StudyEvidence) -> Section:
    levels = evidence.noise.levels
    rows: list[list[Cell]] = [["cell", "C", "runs", "both seeds", "weights", "data"]]
    rows += [_level(level) for level in levels]
    n = sum(level.runs for level in levels)
    return Section(
        "noise", "Noise by the seeds", [
            ("repeats", figures.repeats(evidence.records, levels),
             "Runs that differ only in their seeds. Black dot: the cell itself; blue square: other "
             "initial weights; orange diamond: another order of the data."),
        ], rows, head=True,
        after=["Standard deviation of log loss, with its degrees of freedom in brackets. Both "
               "seeds: of a run with new weights and a new order of the data."],
        rests=f"From {n} runs of {_cells(len(levels))}.",
    )  # fmt: skip


def _level(level: Level) -> list[Cell]:
    spreads = [_spread(s) for s in (level.noise, level.weights, level.data)]
    return [level.cell, number(level.flops, 3), str(level.runs), *spreads]


def _spread(s: Spread | None) -> Cell:
    return Markup("{} ({})").format(percent(s.sd), s.free) if s else "not known"


def _costs(evidence: StudyEvidence) -> Section:
    stages = [s for s in evidence.stages if s.seconds]
    rows: list[list[Cell]] = [
        ["stage", "budget", "cells ended", "FLOPs spent", "FLOPs planned", "device-hours", "ETTR"]
    ]
    rows += [_stage(s) for s in evidence.stages]
    spent = sum(s.spent for s in evidence.stages if not s.is_target)
    share = percent(spent / evidence.cap, 1) if evidence.cap else ""
    total = Markup("Spent {} of the cap of {} FLOPs ({}){}.").format(
        number(spent, 4), number(evidence.cap, 4), share,
        ", without the target" if any(s.is_target for s in evidence.stages) else "",
    )  # fmt: skip
    summary = ", ".join(f"{n} {status}" for status, n in evidence.statuses.items())
    buckets = figures.buckets_of(stages)
    return Section(
        "costs", "Cost, and where the time went", [
            ("goodput", figures.hours(stages),
             "Shares of the wall clock of a stage's runs, each from its first start to its last "
             "end. Compute counts only steps that were kept; its share is the ETTR, the effective "
             "training time ratio."),
        ], rows, head=True, key=[(b, figures.hue(b)) for b in buckets],
        after=[total, f"Cells: {summary}.",
               "FLOPs include lost steps; a branch counts from its trunk on. Device-hours are "
               "those of complete runs: the hours of each launch times its ranks."],
        rests=f"From {_cells(sum(s.ended for s in evidence.stages))} that ended, and running "
              "ones.",
    )  # fmt: skip


def _stage(s: StageCost) -> list[Cell]:
    planned = number(s.low, 3) if s.low == s.high else span((s.low, s.high), 3)
    hours: Cell = "not known" if s.device_hours is None else number(s.device_hours, 3)
    budget: Cell = "the target" if s.is_target else number(s.budget, 3) if s.budget else ""
    ettr: Cell = "" if s.ettr is None else percent(s.ettr, 1)
    spent = number(s.spent, 3) if s.spent else "0"
    ended = f"{s.ended} of {s.cells}"
    return [str(s.number), budget, ended, spent, planned, hours, ettr]


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"
