"""Compute budgets: found where the runs' own C shows them, checked where they are named.

    grouped   budgets of runs without a column of them
    mismatch  named budgets that are not the runs' own C: rounded, or counted otherwise

Invariant: C that does not fall into groups has no budgets; none are made up. A named budget is
never changed.
"""

from collections.abc import Mapping

import numpy as np

from forescale.scaling.fitting.isoflop import SPREAD
from forescale.scaling.fitting.points import Array

_GROUPS = 3  # budgets that a study has at least
_SIZES = 3  # different N of a budget at least: fewer don't determine a parabola
_BETWEEN = 0.2  # log C between neighbouring budgets at least; planned steps are 0.4 and more
_ALONE = 0.1  # greatest share of runs that belong to no budget
_CONVENTION = 2.0  # C by one convention over C by another differs among runs by less than this
_ROUNDED = 0.1  # a budget's name may differ from the C of its runs by this fraction

_TAKE = "or take the budgets as C: columns='{flops: budget}'"


def grouped(flops: Array, parameters: Array) -> tuple[Array, str] | None:
    """Return the budget of each run in FLOPs, (n,), and a sentence on where they are from, by the
    runs' C and N, (n,) each; None if C shows no budgets.

    A group is several sizes at nearly one C: three or more different N within 5 % of C, and no
    other run within 20 %. There must be three groups with nine in ten of the runs. A run that is in
    no group has its own C as its budget.
    """
    if not len(flops):
        return None
    log_c = np.log(flops)
    order = np.argsort(log_c, kind="stable")
    breaks = np.flatnonzero(np.diff(log_c[order]) > np.log1p(SPREAD)) + 1
    groups = np.split(order, breaks)
    ends = np.array([[log_c[g[0]], log_c[g[-1]]] for g in groups])
    gaps = np.concatenate(([np.inf], ends[1:, 0] - ends[:-1, 1], [np.inf]))
    usable = (np.minimum(gaps[1:], gaps[:-1]) > _BETWEEN) & (
        np.ptp(ends, axis=1) <= np.log1p(SPREAD)
    )
    budgets = [g for g, ok in zip(groups, usable, strict=True)
               if ok and len(np.unique(parameters[g])) >= _SIZES]  # fmt: skip
    alone = len(flops) - sum(map(len, budgets))
    if len(budgets) < _GROUPS or alone > _ALONE * len(flops):
        return None
    of_run = np.array(flops, dtype=float)
    for g in budgets:
        of_run[g] = float(f"{np.exp(log_c[g].mean()):.3g}")
    others = f"; {alone} of {len(flops)} runs are in none" if alone else ""
    sentence = f"C of the runs falls into {len(budgets)} groups, which are taken as budgets"
    return of_run, f"The table names no budgets: {sentence}{others}."


def mismatch(
    budgets: Array, flops: Array, parameters: Array, costs: Mapping[str, Array] | None = None
) -> str | None:
    """Return a sentence if the named budgets are not the C of their runs, with the cure, or None.

    budgets: of each run; flops: its C as the fit counts it; parameters: its N; costs: C by other
    conventions, by their names, such as {"6 N D": 6 N D}; (n,) each.
    """
    distinct = np.unique(budgets)
    if len(distinct) > len(budgets) / 2 and grouped(budgets, parameters):
        return (
            f"The {len(budgets)} runs have {len(distinct)} different budgets, some of which differ "
            f"by less than {SPREAD:.0%}: runs of one budget are not recognised as such. Write the "
            "same number for all runs of a budget, or leave out the column 'budget'."
        )
    if not (wide := _wide(budgets, flops)):
        logs = np.array([np.log(flops[budgets == b]).mean() - np.log(b) for b in distinct])
        if np.abs(logs).max() <= np.log1p(_ROUNDED):
            return None
        factor = f"{np.exp(logs.mean()):.3g}"
        why = "they are counted by different conventions"
        if np.ptp(logs) > np.log1p(SPREAD):
            factor = f"{np.exp(logs.min()):.3g} to {np.exp(logs.max()):.3g}"
            why = "the names are rounded, or counted by another convention"
        return (
            f"C of the runs is {factor} times the budget that they name: {why}. Parabolas use C. "
            f"If the budgets are right, count C as they do, {_TAKE}."
        )
    worst = max(wide, key=lambda b: float(np.ptp(np.log(flops[budgets == b]))))
    odd = flops[budgets == worst]
    if agree := [n for n, c in (costs or {}).items() if not _wide(budgets, c)]:
        cure = (
            f"The budgets are those of {' and of '.join(agree)}, and C is counted otherwise. Count "
            f"C as the budgets do: choose it by cost= for runs of ours, {_TAKE}."
        )
    elif (by_c := grouped(flops, parameters)) is not None:
        cure = (
            f"C itself falls into {len(np.unique(by_c[0]))} groups: leave out the column 'budget' "
            "to use these."
        )
    elif np.ptp(np.log(flops / budgets)) <= np.log(_CONVENTION):
        cure = (
            "The budgets are rounded, or counted otherwise than C. If they are right, count C as "
            f"they do, {_TAKE}."
        )
    else:
        cure = "Correct C or the budgets of these runs, or leave out the column 'budget'."
    return (
        f"In {len(wide)} of {len(distinct)} budgets C differs by more than {SPREAD:.0%} (at "
        f"{worst:.3g} FLOPs from {odd.min():.3g} to {odd.max():.3g}), so that they have no "
        f"parabola. {cure}"
    )


def _wide(budgets: Array, flops: Array) -> list[float]:
    """Return the budgets in which C differs by more than SPREAD."""
    each = ((float(b), np.log(flops[budgets == b])) for b in np.unique(budgets))
    return [b for b, c in each if np.ptp(c) > np.log1p(SPREAD)]
