"""The sentences about a prediction that terminal and page share."""

from collections.abc import Sequence

from forescale.scaling.analysis.backtest import MINIMA, Scores
from forescale.scaling.analysis.prediction import Prediction
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.forecasting.predictor import LAW, LEVEL, LINE

_AHEAD = {1: "one budget", 2: "two budgets"}


def doubt_of(made: StudyFit, f: Prediction) -> str:
    """Return what the intervals of a prediction rest on."""
    if f.method == LEVEL:
        known = f"{f.origins} earlier forecasts" if f.origins else "a prior alone"
        return (
            "It continues the lowest losses of the budgets, and adds what a run loses off the "
            f"optimum; the widths come from the errors of {known}. The law alone predicts "
            f"{f.law:.4f}."
        )
    source = "a prior alone" if made.discrepancy.is_prior else f"{f.origins} backtests"
    return (
        f"By the law. Its error of {made.discrepancy.per_decade:.1%} per decade beyond the runs "
        f"comes from {source}; resampling alone would give {f.resampled[0]:.4f} to "
        f"{f.resampled[1]:.4f}."
    )


def skill_lines(found: Sequence[Scores]) -> list[str]:
    """Return a sentence for each distance ahead: how far off such predictions would have been."""
    said = []
    by = {(one.ahead, one.method): one for one in found if one.table is None}
    for ahead, words in _AHEAD.items():
        mine = by.get((ahead, LEVEL)) or by.get((ahead, LAW))
        line = by.get((ahead, LINE))
        if mine is None or line is None:
            continue
        held = mine.coverage[MINIMA]
        times = f"{mine.count} times" if mine.count > 1 else "once"
        said.append(
            f"Backtest, {words} ahead, {times}: predictions by {mine.method} were off by "
            f"{mine.median:.2%} (median; mean {mine.bias:+.2%}) at the lowest loss of a budget, "
            f"a straight line through the last two budgets by {line.median:.2%} (skill "
            f"{mine.skill[LINE]:+.2f}); {round(held.outer * held.count)} of {held.count} were "
            "inside the 90% interval."
        )
    return said
