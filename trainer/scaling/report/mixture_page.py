"""Mixtures of sources: the sections for the terminal and the page, and the pictures.

    shares   a figure for each source: the goal of each run over its share, and the law along the
             line through the best mixture

Invariant: the numbers of the fit, nothing smoothed; the same fit gives the same bytes. Everything
that makes the answer doubtful is shown with it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from forescale.pages import figure as chart
from forescale.pages.document import Cell, Section, code, number, percent, render
from forescale.scaling.analysis.mixture_fit import MixtureFit
from forescale.scaling.analysis.ratio import Ratio
from forescale.scaling.fitting.mixing import CURRENT
from forescale.scaling.report.evidence import StudyEvidence
from forescale.scaling.report.fit_page import write_report
from forescale.scaling.report.fit_sections import reasons
from forescale.scaling.report.provenance import provenance

_FINE = 61
_MOST = 8  # sources that have a figure, those with the largest best shares


def write(fit: MixtureFit, table: pd.DataFrame, path: Path, command: Sequence[str]) -> list[Path]:
    """Write the page, and beside it the pictures as PNG and SVG and the records; return the
    paths."""
    sections = mixture_sections(fit)
    origin = provenance("", StudyEvidence(table), fit.where, command)
    drawn = _pictures(fit)
    html = render(title="Mixtures of sources", intro=summary_of(fit),
                  sections=[*sections[:2], drawn, *sections[2:], origin])  # fmt: skip
    return write_report(path, html, {"shares": drawn}, table)


def summary_of(fit: MixtureFit) -> str:
    """Return what was fitted, as a sentence."""
    noise = f"{fit.noise.sd:.2%}" if fit.noise.free else "unknown"
    goal = " + ".join(f"{weight:.3g} {name}" for name, weight in fit.goal.items())
    return (
        f"{len(fit.runs)} runs of {len(fit.shares)} mixtures of {len(fit.sources)} sources. Goal: "
        f"the held-out loss {goal}. Noise of a run by its seed: {noise}."
    )


def mixture_sections(fit: MixtureFit) -> list[Section]:
    """Return the sections without pictures: answer, doubts, numbers, laws, check."""
    level = f"{fit.job.level:.0%}"
    shares: list[list[Cell]] = [["source", "best share", level, *list(fit.places)[1:]]]
    for name in fit.sources:
        low, high = fit.ends[name]
        others = [percent(each[name], 1) for each in list(fit.places.values())[1:]]
        shares.append([name, percent(fit.best[name], 1), f"{low:.1%} to {high:.1%}", *others])
    goals: list[list[Cell]] = [["mixture", "goal", level, *(f"loss {name}" for name in fit.goal)]]
    for name, each in fit.places.items():
        goal = fit.predicted(each)
        losses = [number(fit.predicted(each, of).value) for of in fit.goal]
        goals.append([name, number(goal.value), _ends(goal), *losses])
    weights = ", ".join(f"{name}: {share:g}" for name, share in fit.best.items())
    gains = [
        f"{_change(fit.against(fit.best, each))} of the {name} one"
        for name, each in list(fit.places.items())[1:]
    ]
    ready: list[Cell] = [
        code(f"data.weights='{{{weights}}}'"),
        f"Predicted goal of the best mixture, at the size of these runs: {', '.join(gains)}.",
    ]
    trials: list[list[Cell]] = [["predictor", "error", "law"]]
    trials += [[t.name, percent(t.error), t.text] for t in fit.trials]
    chosen = (
        "Error: root mean square of the relative error of the goal, each mixture predicted from "
        f"all others. Taken: the {fit.law.name} law, {fit.law.size(len(fit.sources))} parameters a "
        "loss."
    )
    return [
        Section("answer", "Best shares", rows=shares, head=True, after=ready),
        reasons([*fit.doubts]),
        _check(fit),
        Section("goals", "Predicted losses", rows=goals, head=True),
        Section("laws", "How well left-out mixtures are predicted", rows=trials, head=True,
                after=[chosen]),
    ]  # fmt: skip


def _ends(ratio: Ratio, digits: int = 4) -> str:
    return f"{ratio.low:.{digits}f} to {ratio.high:.{digits}f}"


def _change(ratio: Ratio) -> str:
    """Return a ratio of goals as a change, with its interval."""
    if ratio.high == np.inf:
        return f"{ratio.value - 1:+.2%} (interval unknown: one seed)"
    return f"{ratio.value - 1:+.2%} ({ratio.low - 1:+.2%} to {ratio.high - 1:+.2%})"


def _check(fit: MixtureFit) -> Section:
    """Return the section about the larger runs."""
    title, check = "The check at more compute", fit.check
    if check is None:
        return Section("check", title, absent="No larger run has checked the answer.")
    rows: list[list[Cell]] = [
        ["mixture checked", ", ".join(f"{n} {share:.1%}" for n, share in check.shares.items())],
        ["C of a run", number(check.flops, 3)],
        ["goal, best and current", f"{check.goals[0]:.4f} and {check.goals[1]:.4f}"],
        ["change, observed", f"{_change(check.ratio)}, {check.pairs} pairs of seeds"],
        ["change, predicted", f"{_change(check.predicted)}, at the size of the small runs"],
    ]
    holds = "The best mixture is better there too."
    if check.ratio.includes_one:
        holds = f"No difference from the {CURRENT} mixture is shown there."
    elif check.ratio.low > 1:
        holds = f"There the {CURRENT} mixture is better: do not use the predicted one."
    return Section("check", title, rows=rows, after=[holds])


def _pictures(fit: MixtureFit) -> Section:
    """Return the section with a figure for each source."""
    names = sorted(fit.sources, key=lambda name: -fit.best[name])[:_MOST]
    level = f"{fit.job.level:.0%}"
    about = (
        "Dots: runs. Line: the law where the other sources keep the proportions of the best "
        f"mixture, with the {level} band; runs have other proportions, and lie "
        "beside it. Star: the best mixture. Diamond: the current one."
    )
    pictures = [(f"share-{name}", panel(fit, name), "") for name in names]
    return Section("shares", "Loss against the share of each source",
                   [*pictures[:-1], (*pictures[-1][:2], about)])  # fmt: skip


def panel(fit: MixtureFit, source: str) -> chart.Figure:
    """Return the figure of one source."""
    column = fit.runs[f"share_{source}"].to_numpy(dtype=float)
    at = np.linspace(column.min(), column.max(), _FINE)
    values, ends = fit.curve(source, at)
    figure = chart.Figure(chart.Axis(f"share of {source}", percent=True), chart.Axis("goal"), 300)
    figure.add(chart.band(at, ends, chart.FAINT), chart.line(at, values, chart.INK))
    goals = fit.runs["goal"].to_numpy(dtype=float)
    texts = [
        "\n".join([f"{row.get('name', 'run')}", f"goal {row['goal']:.5g}",
                   *(f"{name} {row[f'share_{name}']:.1%}" for name in fit.sources)])
        for _, row in fit.runs.iterrows()
    ]  # fmt: skip
    figure.add(chart.dots(column, goals, [chart.LINES[0]] * len(goals), texts))
    if CURRENT in fit.places:
        current = fit.places[CURRENT]
        goal = fit.predicted(current).value
        figure.add(chart.marks([current[source]], [goal], [f"current\ngoal {goal:.5g}"]))
    best = fit.predicted(fit.best)
    text = f"best\ngoal {best.value:.5g}\n{_ends(best)}"
    return figure.add(chart.star(fit.best[source], best.value, text, name="best"))
