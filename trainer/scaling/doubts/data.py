"""What makes the data of a fit doubtful: rows twice, units, odd C, losses that are not in nats.

Invariant: a doubt is a sentence that says what was found, in which runs, and what to do. A table of
clean runs, by any usual way to count N, D and C and with any usual loss of text, gives none.
"""

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd

from forescale.scaling.fitting.points import Array, Points

# C / (N D) by usual conventions, for models that aren't tiny: 2 is a forward pass, 6 training, 8
# with recomputed activations; attention and embeddings add to it or take from it.
_USUAL = (1.7, 14.0)
_ODD = 1.6  # C / (N D) of a run over that of runs of similar N and D, from which it is an exception
_RATIOS = (1e-3, 1e5)  # D/N of usual studies, in the median; compute-optimal runs have about 20
_APART = 2.5  # decades between runs in one unit and runs in another, at least
_UNITS = {3: "thousands", 6: "millions", 9: "billions", 12: "trillions"}
_SYMBOLS = {"parameters": "N", "tokens": "D", "flops": "C"}
_NAMED = 4  # runs that a sentence names
# A law of usual text in nats per token: A, alpha, B, beta, E of Besiroglu et al. 2024.
_USUAL_LAW = (482.0, 0.348, 2085.4, 0.366, 1.817)
# No usual loss of text is so many times that of _USUAL_LAW; a perplexity is, unless of bytes.
_TOO_HIGH = 2.5


def data_doubts(
    table: pd.DataFrame, points: Points, columns: Mapping[str, str] | None = None
) -> list[str]:
    """Return the doubts about the data, the most serious first.

    table: the records; points: the same runs, in the same order; columns: which column of a foreign
    table is which of ours, {ours: theirs}.
    """
    in_units = units(table, points)
    sentences = [*in_units, *perplexity(table, points)]
    if not in_units:
        sentences += odd_compute(table, points)
    sentences += twice(table, points)
    return sentences or other_loss(columns or {})


def named(table: pd.DataFrame, which: Array) -> str:
    """Return the number of the runs of a mask, (n,), and the first of their names, or else of
    their rows, 0 being the first."""
    at = np.flatnonzero(which)
    has_names = "name" in table and table["name"].nunique() == len(table)
    first = [str(table["name"].iloc[i]) if has_names else str(table.index[i]) for i in at[:_NAMED]]
    others = f" and {len(at) - _NAMED} more" if len(at) > _NAMED else ""
    kind = "" if has_names else "rows " if len(at) > 1 else "row "
    return f"{len(at)} of {len(table)} runs ({kind}{', '.join(first)}{others})"


def twice(table: pd.DataFrame, points: Points) -> list[str]:
    """Return a sentence if runs are listed twice: equal N, D, C, loss and seed, by whatever name.

    Losses of few digits are equal by chance, so all columns must be equal then.
    """
    columns = {k: getattr(points, k) for k in ("parameters", "tokens", "flops", "loss")}
    keys = pd.DataFrame({k: v for k, v in columns.items() if v is not None})
    keys = keys.assign(**{k: table[k].to_numpy() for k in ("seed", "init_seed") if k in table})
    rounded = bool((np.abs(points.loss - points.loss.round(3)) < 1e-9).all())
    again = (table.astype(str) if rounded else keys).duplicated().to_numpy()
    if not again.any():
        return []
    return [
        f"{named(table, again)} repeat an earlier row, with the same N, D and loss. They count "
        "twice in the law, and its intervals are too narrow. Remove them from the table."
    ]


def units(table: pd.DataFrame, points: Points) -> list[str]:
    """Return a sentence for each column that is in other units in some runs, or in all."""
    x = {
        name: np.log10(values)
        for name in _SYMBOLS
        if (values := _column(table, points, name)) is not None
    }
    if "parameters" not in x or "tokens" not in x:
        return []
    powers = np.zeros(len(points), dtype=int)
    if "flops" in x:
        off = x["flops"] - x["parameters"] - x["tokens"] - np.log10(6)
        powers = 3 * np.round(off / 3).astype(int)
        powers[np.abs(off - powers) > 0.75] = 0
        others = off[powers == 0]
        if len(others) and (powers != 0).any():
            gap = np.abs(off[powers != 0][:, None] - others).min()
            powers *= int(gap > _APART - 1)
    sentences = [
        _in_units(table, *_guilty(x, powers == p, int(p)), powers == p)
        for p in np.unique(powers[powers != 0])
    ]
    return sentences or _gaps(table, x)


def _column(table: pd.DataFrame, points: Points, name: str) -> Array | None:
    """Return N, D or C of the runs; the budgets as C if there is no C; active parameters as N."""
    if name == "parameters" and "parameters_active" in table:
        return table["parameters_active"].to_numpy(dtype=float)
    values: Array | None = getattr(points, name)
    if values is None and name == "flops" and "budget" in table:
        return table["budget"].to_numpy(dtype=float)
    return values


def _guilty(x: Mapping[str, Array], mask: Array, power: int) -> tuple[str, int]:
    """Return the column whose correction makes `mask` runs like the others, and its unit's power.

    x: log10 of N, D and C; power: that of C / (N D) over the usual. If all runs are the same, it is
    the correction after which D/N is nearest to 20.
    """
    scores = {}
    for name in _SYMBOLS:
        unit = -power if name == "flops" else power
        fixed = {k: v[mask] + (unit if k == name else 0) for k, v in x.items()}
        if mask.all():
            scores[name] = abs(np.median(fixed["tokens"] - fixed["parameters"]) - np.log10(20))
        else:
            scores[name] = sum(abs(np.median(v) - np.median(x[k][~mask])) for k, v in fixed.items())
    name = min(scores, key=lambda k: float(scores[k]))
    return name, -power if name == "flops" else power


def _gaps(table: pd.DataFrame, x: Mapping[str, Array]) -> list[str]:
    """Return a sentence if a wide gap in N, D or D/N parts runs in different units of N or of D, or
    if D/N is far from that of any study.

    For tables without C, or whose C or D was computed from the other columns.
    """
    n, d = x["parameters"], x["tokens"]
    for values in (n, d, d - n):
        order = np.sort(values)
        i = int(np.argmax(np.diff(order))) if len(order) > 1 else 0
        if len(order) < 2 or order[i + 1] - order[i] < _APART:
            continue
        low = values <= order[i]
        apart = [float(np.median(v[~low]) - np.median(v[low])) for v in (n, d)]
        which = int(np.argmax(np.abs(apart)))
        step, other = apart[which], apart[1 - which]
        power = 3 * round(abs(step) / 3)
        if power in _UNITS and abs(abs(step) - power) <= 1:
            if min(abs(other), abs(step + other)) > 1.5:
                continue  # N and D both grow: larger runs, not another unit
            mask = low if step > 0 else ~low
            return [_in_units(table, ("parameters", "tokens")[which], power, mask)]
    ratio = float(10 ** np.median(d - n))
    if _RATIOS[0] <= ratio <= _RATIOS[1]:
        return []
    return [
        f"D/N of the runs is {ratio:.2g} in the median: N or D is in other units. Write both as "
        "plain numbers; until then the law has no meaning."
    ]


def _in_units(table: pd.DataFrame, name: str, power: int, mask: Array) -> str:
    """Return the sentence for a column in units of 10^power; power < 0: it is too large."""
    unit = f"in {_UNITS[power]}" if power in _UNITS else f"in units of 1e{power}"
    if power < 0:
        unit = f"{10.0**-power:.0e} times too large"
    where = f"all {len(table)} runs" if mask.all() else named(table, mask)
    return (
        f"{_SYMBOLS[name]} of {where} is {unit}, judged by N, D and C of the runs. Write all "
        f"{_SYMBOLS[name]} as plain numbers; until then the law has no meaning."
    )


def odd_compute(table: pd.DataFrame, points: Points) -> list[str]:
    """Return a sentence if C is no usual multiple of N D, or if that of some runs is an exception.

    C / (N D) may change smoothly with N and D, as by causal attention or embeddings.
    """
    n, d, c = (_column(table, points, name) for name in _SYMBOLS)
    if n is None or d is None or c is None:
        return []
    x, z, y = np.log(n), np.log(d), np.log(c / n / d)
    trend = _smooth(x - x.mean(), z - z.mean(), y)
    odd = np.abs(y - trend) > np.log(_ODD)
    if odd.mean() > 0.25:
        low, high = np.exp(np.quantile(y, [0.05, 0.95]))
        return [
            f"C of the runs is {low:.3g} to {high:.3g} times N D, and no smooth function of them: "
            "N, D and C belong to different runs or are counted differently in some. Correct the "
            "columns."
        ]
    sentences = []
    if odd.any():
        worst = int(np.argmax(np.abs(y - trend)))
        sentences.append(
            f"C of {named(table, odd)} is not that of its N and D: at the worst "
            f"{np.exp(y[worst]):.3g} N D, where other runs have {np.exp(trend[worst]):.3g}. Check "
            "their N, D and C."
        )
    large = n >= np.quantile(n, 0.75)  # small ones have relatively more embeddings and attention
    usual = float(np.exp(np.median(trend[large])))
    if not _USUAL[0] <= usual <= _USUAL[1]:
        sentences.insert(
            0,
            f"C is {usual:.3g} N D for the largest models, where training costs about 6 N D and by "
            "no usual way to count less than 2 or more than 14. Check the units of N, D and C, and "
            "that D counts the tokens of all epochs.",
        )
    return sentences


def _smooth(x: Array, z: Array, y: Array) -> Array:
    """Return a quadratic of x and z fitted to y by least absolute deviations, (n,); for fewer than
    12 runs their median."""
    if len(y) < 12:
        return np.full_like(y, np.median(y))
    X = np.stack((np.ones_like(x), x, z, x * x, x * z, z * z), axis=1)
    w = np.ones_like(y)
    for _ in range(50):  # reweighted least squares
        root = np.sqrt(w)[:, None]
        trend: Array = X @ np.linalg.lstsq(X * root, y * root[:, 0], rcond=1e-9)[0]
        w = 1 / np.maximum(np.abs(y - trend), 1e-3)
    return trend


def perplexity(table: pd.DataFrame, points: Points) -> list[str]:
    """Return a sentence if the loss of some runs, or of all, is a perplexity.

    The loss is then several times that of usual text at its N and D, and its logarithm is nearer.
    """
    n, d = _column(table, points, "parameters"), points.tokens
    if n is None or d is None:
        return []
    a, alpha, b, beta, e = _USUAL_LAW
    usual = a * n**-alpha + b * d**-beta + e
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.abs(np.log(np.log(points.loss) / usual)) < np.abs(np.log(points.loss / usual))
    mask = (points.loss > _TOO_HIGH * usual) & near
    if mask.mean() < 0.1:
        return []
    where = f"all {len(table)} runs" if mask.all() else named(table, mask)
    low, high = points.loss[mask].min(), points.loss[mask].max()
    return [
        f"The loss of {where} looks like a perplexity: {low:.4g} to {high:.4g}, where text has "
        f"{usual[mask].min():.2g} to {usual[mask].max():.2g} nats per token at these N and D. The "
        "law is one of nats: give the logarithm of a perplexity."
    ]


def other_loss(columns: Mapping[str, str]) -> list[str]:
    """Return a sentence if the name of the foreign column of the loss tells another unit."""
    name = columns.get("loss", "")
    words = set(re.split(r"[^a-z]+", name.lower()))
    if words & {"ppl", "perplexity"}:
        return [
            f"The loss is read from '{name}', which a perplexity is called. The law is one of "
            "nats: give the logarithm of a perplexity."
        ]
    if words & {"bits", "bit", "bpb", "bpc", "bpt"}:
        return [
            f"The loss is read from '{name}', so A, B, E and predictions are in bits. Multiply "
            "losses by 0.693 to compare them with laws in nats."
        ]
    return []
