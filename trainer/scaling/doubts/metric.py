"""What the data can't tell of a task, as sentences that need no statistics to be read.

    unseen     the metric has nothing to do with the loss: no prediction is made
    others     few budgets; a metric that gets worse, or turns, as the loss falls

Invariant: these functions read losses and metrics alone, and change neither.
"""

import numpy as np
import pandas as pd
from scipy.special import fdtrc, stdtr  # scipy.stats takes half a second to import

from forescale.scaling.fitting.points import Array

FEWEST = 4  # budgets with which a prediction can be checked: some to fit, one to predict
_CHANCE = 0.05  # chance of a link at least as good between numbers that have nothing in common
_CLEAR = 0.5  # a rank correlation of at least this size is a direction
_SIDE = 5  # runs of a half at least, for a direction of its own


def unseen(loss: Array, metric: Array, fitted: Array, free: int) -> str | None:
    """Return why the metric can't be predicted from the loss, or None if it can.

    It is an F test of the link against one value for all runs. loss, metric, fitted: (n,) each;
    free: parameters of the link.
    """
    low, high = float(metric.min()), float(metric.max())
    if low == high:
        return f"The metric is {low:.4g} in all runs: the data can't tell how it changes."
    around = float(np.square(metric - metric.mean()).sum())
    left = float(np.square(metric - fitted).sum())
    freedom = max(1, len(metric) - free)
    ratio = max(0.0, around - left) / max(1, free - 1) / max(left / freedom, 1e-300)
    if fdtrc(max(1, free - 1), freedom, ratio) <= _CHANCE:
        return None
    return (
        f"The metric is {low:.4g} to {high:.4g}, and no more than chance ties it to the loss: the "
        "data can't tell how it changes. All runs may be at the level of guessing; add runs with "
        "lower losses."
    )


def others(loss: Array, metric: Array, rises: bool, budgets: int | None, name: str) -> list[str]:
    """Return what else makes a link doubtful.

    rises: whether the metric should rise with the loss; budgets: number of different budgets, if
    it is known; name: the kind of the metric.
    """
    sentences = []
    if budgets is not None and budgets < FEWEST:
        sentences.append(
            f"The runs have {budgets} different budgets: fewer than {FEWEST} can't show how far "
            "off such predictions are, so nothing has checked the interval."
        )
    good = metric if rises else -metric  # falls as the metric gets better
    order = np.argsort(loss)
    half = len(order) // 2
    sides = [_direction(loss[part], good[part]) for part in (order[:half], order[half:])]
    if sides[0] * sides[1] < 0:
        better, worse = ("higher", "lower") if sides[0] < 0 else ("lower", "higher")
        sentences.append(
            f"The metric turns: among the runs with {better} losses it gets better as the loss "
            f"falls, among those with {worse} losses it gets worse. No link turns, so the "
            "prediction can be far off."
        )
    elif _direction(loss, good) < 0:
        other = {"accuracy": "error", "error": "accuracy"}.get(name)
        hint = f"if the column holds {other}, write metric={other}; else " if other else ""
        sentences.append(
            f"The metric gets worse as the loss falls: {hint}it isn't tied to this loss."
        )
    return sentences


def _direction(loss: Array, good: Array) -> int:
    """Return 1 if `good` rises with the loss, -1 if it falls, 0 if neither is clear by ranks."""
    if len(loss) < _SIDE or np.ptp(good) == 0 or np.ptp(loss) == 0:
        return 0
    n, r = len(loss), float(np.corrcoef(*pd.DataFrame([loss, good]).rank(axis=1).to_numpy())[0, 1])
    t = abs(r) * np.sqrt((n - 2) / max(1e-12, 1 - r * r))
    is_clear = abs(r) >= _CLEAR and 2 * stdtr(n - 2, -t) <= _CHANCE
    return int(np.sign(r)) if is_clear else 0
