"""The sections of a study's report besides the law: forecasts, sweeps, noise, costs.

Invariant: a section is there only if it has something to show, and has its numbers as a table.
"""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from forescale.pages.document import Cell, Section, number, percent, span
from forescale.scaling.analysis.forecast import Forecast, Score
from forescale.scaling.analysis.ratio import Spread
from forescale.scaling.report import study_figures as figures
from forescale.scaling.report.evidence import StageCost, StudyEvidence
from forescale.scaling.report.fit_figures import flops_key
from forescale.scaling.report.fit_sections import observed
from forescale.scaling.study.directory import TARGET

Shades = Mapping[float, str]


def sections(evidence: StudyEvidence, shades: Shades) -> list[Section]:
    """Return the sections with content, in the order of the page. shades: colours of the
    budgets."""
    parts = list[Section]()
    if evidence.score is not None:
        parts.append(forecast_section(evidence.forecasts, evidence.score))
    if evidence.rate_sweeps or evidence.batch_sweeps:
        parts.append(_response(evidence, shades))
    if evidence.noise.levels:
        parts.append(_noise(evidence))
    if any(s.seconds for s in evidence.stages):
        parts.append(_costs(evidence))
    return parts


def forecast_section(forecasts: Sequence[Forecast], scored: Score) -> Section:
    """Return the forecasts beside the observed losses, and their score."""
    n, out, level = len(forecasts), len(scored.errors), f"{forecasts[0].facts['level']:.0%}"
    rows: list[list[Cell]] = [
        ["forecast", "run", "beyond", "predicted", f"{level} interval", "observed", "to predicted",
         "inside", "written"]
    ]  # fmt: skip
    for forecast in forecasts:
        f, outcome = forecast.facts, forecast.outcome
        result: list[Cell] = ["pending", "", ""]
        if outcome:
            is_inside = f["interval"][0] <= outcome["loss"] <= f["interval"][1]
            result = [number(outcome["loss"]), percent(outcome["loss"] / f["loss"] - 1, sign="+"),
                      "yes" if is_inside else "no"]  # fmt: skip
        beyond = Markup("{} x").format(number(f["target"].get("extrapolation_factor", math.nan), 3))
        rows.append([forecast.id, f["target"]["run"], beyond, number(f["loss"]),
                     span(f["interval"]), *result, f.get("time", "")])  # fmt: skip
    lines = list[Cell]([f"{out} of {n} forecasts have an observed loss."])
    if out:
        skill = ", ".join(f"{name} {x:+.2f}".replace("-", "−") for name, x in scored.skill.items())
        lines[0] = (
            f"{out} of {n} forecasts have an observed loss: {scored.inside} inside the interval, "
            f"{scored.inside_50} inside the 50% interval. Interval score "
            f"{scored.interval_score:.4g}. Skill (1 − mean absolute error relative to a simpler "
            f"prediction): {skill}."
        )
    for forecast in forecasts:
        if forecast.facts["target"]["run"] == TARGET:
            text = Markup("The target: predicted {} ({} to {}); observed: {}.")
            loss, ends = forecast.facts["loss"], forecast.facts["interval"]
            lines.insert(0, text.format(*map(number, (loss, *ends)), observed(forecast)))
    if scored.anew:
        errors = [[abs(e) for x, e, _ in scored.anew if (x < 0.5) == early] for early in (1, 0)]
        means = [percent(sum(half) / len(half)) if half else "-" for half in errors]
        text = Markup(
            "At {} checkpoints the runs forecast their own ends anew: mean absolute error {} "
            "before half of the steps, {} after; {} inside their {} interval."
        )
        held = sum(is_inside for *_, is_inside in scored.anew)
        lines.append(text.format(len(scored.anew), *means, held, level))
    if scored.abandoned:
        lines.append(f"{len(scored.abandoned)} runs have no record yet.")
    return Section(
        "forecasts", "Forecasts and observed losses", [
            ("forecast-errors", figures.forecasts(forecasts),
             f"Each line is a run that was predicted before it started. Pale: the {level} "
             "interval; dark: the 50% interval, both relative to the predicted loss. Dot: the "
             f"observed loss; orange diamond: it is outside the {level} interval; hollow: it is "
             "not known yet."),
        ], rows, head=True,
        after=[*lines, "Each forecast contains the hash of the one before it, and this chain is "
               "intact. To predicted: observed loss relative to predicted loss."],
        rests=f"From {n} forecast{'s' * (n != 1)}, written before their runs had a record.",
    )  # fmt: skip


def _response(evidence: StudyEvidence, shades: Shades) -> Section:
    kinds = {"learning rate": evidence.rate_sweeps, "batch": evidence.batch_sweeps}
    every = [(name, c) for name, sweeps in kinds.items() for c in sweeps]
    budgets = {c.budget for _, c in every}
    section = Section("response", "Sweeps of learning rate and batch", head=True)
    section.key = flops_key({b: c for b, c in shades.items() if b in budgets})
    drawn = {name: figures.sweep_responses(sweeps, name, shades) if sweeps else
             "No cell has been run at three learning rates yet."
             for name, sweeps in kinds.items() if sweeps or name != "batch"}  # fmt: skip
    caption = (
        "Each line is one cell: the parabola through its best run and the neighbours, in "
        "logarithms, and thin straight lines beyond it. Solid: the smallest size of a stage; "
        "dashed: larger ones. Hollow: the best run is at the edge of its sweep and no optimum. A "
        "cross at the top: the run diverged."
    )
    section.pictures = [
        (f"response-{name.split()[-1]}", picture, caption if i == len(drawn) - 1 else "")
        for i, (name, picture) in enumerate(drawn.items())
    ]
    section.rows = [
        ["cell", "sweep", "N", "D", "runs", "from", "to", "best", "gap", "optimum inside"]
    ]
    for name, c in every:
        section.rows.append([
            c.cell, name, number(c.parameters), number(c.tokens), str(len(c.values)),
            number(c.values[0], 3), number(c.values[-1], 3), number(c.best, 3),
            "" if c.gap is None else percent(c.gap), "yes" if c.inside else "no",
        ])  # fmt: skip
        sweep = f"{len(c.values)} {'batches' if name == 'batch' else 'learning rates'}"
        if not c.inside:
            section.after.append(
                Markup("{}: the best of {}, {}, is at the edge of the sweep; it is no optimum.")
                .format(c.cell, sweep, number(c.best, 3))
            )  # fmt: skip
        if gone := sum(math.isinf(x) for x in c.losses):
            section.after.append(f"{c.cell}: {gone} of {sweep} diverged.")
    if evidence.noise.gap is not None:
        text = (
            "Gap: log loss by which the best run is above the minimum of its parabola. Root mean "
            "square of {} learning-rate sweeps: {}."
        )
        gap = percent(evidence.noise.gap)
        section.after.append(Markup(text).format(evidence.noise.sweeps, gap))
    section.rests = f"From {sum(len(c.values) for _, c in every)} runs of {_cells(len(every))}."
    return section


def _noise(evidence: StudyEvidence) -> Section:
    def cell(s: Spread | None) -> Cell:
        return Markup("{} ({})").format(percent(s.sd), s.free) if s else "not known"

    levels = evidence.noise.levels
    rows: list[list[Cell]] = [["cell", "C", "runs", "both seeds", "weights", "data"]]
    for one in levels:
        spreads = map(cell, (one.noise, one.weights, one.data))
        rows.append([one.cell, number(one.flops, 3), str(one.runs), *spreads])
    return Section(
        "noise", "Noise by the seeds", [
            ("repeats", figures.repeats(evidence.records, levels),
             "Runs that differ only in their seeds. Black dot: the cell itself; blue square: other "
             "initial weights; orange diamond: another order of the data."),
        ], rows, head=True,
        after=["Standard deviation of log loss, with its degrees of freedom in brackets. Both "
               "seeds: of a run with new weights and a new order of the data."],
        rests=f"From {sum(one.runs for one in levels)} runs of {_cells(len(levels))}.",
    )  # fmt: skip


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
    return Section(
        "costs", "Cost, and where the time went", [
            ("goodput", figures.hours(stages),
             "Shares of the wall clock of a stage's runs, each from its first start to its last "
             "end. Compute counts only steps that were kept; its share is the ETTR, the effective "
             "training time ratio."),
        ], rows, head=True, key=[(b, figures.hue(b)) for b in figures.buckets_of(stages)],
        after=[total, f"Cells: {summary}.",
               "FLOPs include lost steps; a branch counts from its trunk on. Device-hours are "
               "those of complete runs: the hours of each launch times its ranks."],
        rests=f"From {_cells(sum(s.ended for s in evidence.stages))} that ended, and running "
              "ones.",
    )  # fmt: skip


def _stage(s: StageCost) -> list[Cell]:
    return [
        str(s.number), "the target" if s.is_target else number(s.budget, 3) if s.budget else "",
        f"{s.ended} of {s.cells}", number(s.spent, 3) if s.spent else "0",
        number(s.low, 3) if s.low == s.high else span((s.low, s.high), 3),
        "not known" if s.device_hours is None else number(s.device_hours, 3),
        "" if s.ettr is None else percent(s.ettr, 1),
    ]  # fmt: skip


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"
