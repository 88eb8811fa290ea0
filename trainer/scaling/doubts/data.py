"""What makes the data of a fit doubtful: rows twice, units, odd C, losses that are not in nats.

Invariant: a doubt is a sentence that says what was found, in which runs, and what to do. A table of
clean runs, by any usual way to count N, D and C and with any usual loss of text, gives none.
"""

import re
from collections.abc import Iterator, Mapping

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
# Words in the name of a foreign column of losses, and what they tell.
_OTHER_LOSSES = {
    ("ppl", "perplexity"): "a name of perplexities. The law is one of nats: give the "
    "logarithm of a perplexity.",
    ("bits", "bit", "bpb", "bpc", "bpt"): "so A, B, E and predictions are in bits. Multiply losses "
    "by 0.693 to compare them with laws in nats.",
}


def data_doubts(
    table: pd.DataFrame, points: Points, columns: Mapping[str, str] | None = None
) -> list[str]:
    """Return the doubts about the data, the most serious first.

    table: the records; points: the same runs, in the same order; columns: which column of a foreign
    table is which of ours, {ours: theirs}.
    """
    known = {name: x for name in _SYMBOLS if (x := _column(table, points, name)) is not None}
    in_units = list(_units(table, known)) if {"parameters", "tokens"} <= set(known) else []
    sentences = [*in_units, *_perplexity(table, points, known.get("parameters"))]
    if len(known) == 3 and not in_units:
        sentences += _odd_compute(table, *known.values())
    sentences += _twice(table, points)
    if not sentences:  # the name of the foreign column of the loss may tell another unit
        name = (columns or {}).get("loss", "")
        words = set(re.split(r"[^a-z]+", name.lower()))
        sentences += [f"The loss is read from '{name}', {text}"
                      for kind, text in _OTHER_LOSSES.items() if words & set(kind)][:1]  # fmt: skip
    return sentences


def _column(table: pd.DataFrame, points: Points, name: str) -> Array | None:
    """Return N, D or C of the runs; the budgets as C if there is no C; active parameters as N."""
    if name == "parameters" and "parameters_active" in table:
        return table["parameters_active"].to_numpy(dtype=float)
    values: Array | None = getattr(points, name)
    if values is None and name == "flops" and "budget" in table:
        return table["budget"].to_numpy(dtype=float)
    return values


def _named(table: pd.DataFrame, which: Array) -> str:
    """Return the number of the runs of a mask, (n,), and the first of their names, or else of
    their rows, 0 being the first."""
    at = np.flatnonzero(which)
    has_names = "name" in table and table["name"].nunique() == len(table)
    first = [str(table["name"].iloc[i]) if has_names else str(table.index[i]) for i in at[:_NAMED]]
    others = f" and {len(at) - _NAMED} more" if len(at) > _NAMED else ""
    kind = "" if has_names else "rows " if len(at) > 1 else "row "
    return f"{len(at)} of {len(table)} runs ({kind}{', '.join(first)}{others})"


def _twice(table: pd.DataFrame, points: Points) -> Iterator[str]:
    """Yield a sentence if runs are listed twice: equal N, D, C, loss and seed, by whatever name.

    Losses of few digits are equal by chance, so all columns must be equal then.
    """
    columns = {k: getattr(points, k) for k in ("parameters", "tokens", "flops", "loss")}
    keys = pd.DataFrame({k: v for k, v in columns.items() if v is not None})
    keys = keys.assign(**{k: table[k].to_numpy() for k in ("seed", "init_seed") if k in table})
    rounded = bool((np.abs(points.loss - points.loss.round(3)) < 1e-9).all())
    again = (table.astype(str) if rounded else keys).duplicated().to_numpy()
    if again.any():
        yield (
            f"{_named(table, again)} repeat an earlier row, with the same N, D and loss. They "
            "count twice in the law, and its intervals are too narrow. Remove them from the table."
        )


def _units(table: pd.DataFrame, known: Mapping[str, Array]) -> Iterator[str]:
    """Yield a sentence for each column that is in other units in some runs, or in all.

    C tells it; else a wide gap in N, D or D/N that parts the runs, or a D/N far from that of any
    study: for tables without C, or whose C or D was computed from the other columns.
    """
    x = {name: np.log10(values) for name, values in known.items()}
    n, d = x["parameters"], x["tokens"]
    powers = np.zeros(len(n), dtype=int)
    if "flops" in x:
        off = x["flops"] - n - d - np.log10(6)
        powers = 3 * np.round(off / 3).astype(int)
        powers[np.abs(off - powers) > 0.75] = 0
        others = off[powers == 0]
        if len(others) and (powers != 0).any():
            gap = np.abs(off[powers != 0][:, None] - others).min()
            powers *= int(gap > _APART - 1)
    for power in np.unique(powers[powers != 0]).tolist():
        yield _in_units(table, _guilty(x, powers == power, power), power, powers == power)
    if (powers != 0).any():
        return
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
        # If N and D both grow, these are larger runs and no other unit.
        is_unit = power in _UNITS and abs(abs(step) - power) <= 1
        if is_unit and min(abs(other), abs(step + other)) <= 1.5:
            name = ("parameters", "tokens")[which]
            yield _in_units(table, name, power, low if step > 0 else ~low)
            return
    ratio = float(10 ** np.median(d - n))
    if not _RATIOS[0] <= ratio <= _RATIOS[1]:
        yield (
            f"D/N of the runs is {ratio:.2g} in the median: N or D is in other units. Write both "
            "as plain numbers; until then the law has no meaning."
        )


def _guilty(x: Mapping[str, Array], mask: Array, power: int) -> str:
    """Return the column whose correction makes `mask` runs like the others.

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
    return min(scores, key=lambda k: float(scores[k]))


def _in_units(table: pd.DataFrame, name: str, power: int, mask: Array) -> str:
    """Return the sentence for a column. power: of C / (N D), or of its unit if it is N or D."""
    power, symbol = -power if name == "flops" else power, _SYMBOLS[name]
    unit = f"in {_UNITS[power]}" if power in _UNITS else f"in units of 1e{power}"
    if power < 0:
        unit = f"{10.0**-power:.0e} times too large"
    where = f"all {len(table)} runs" if mask.all() else _named(table, mask)
    return (
        f"{symbol} of {where} is {unit}, judged by N, D and C of the runs. Write all {symbol} as "
        "plain numbers; until then the law has no meaning."
    )


def _odd_compute(table: pd.DataFrame, n: Array, d: Array, c: Array) -> Iterator[str]:
    """Yield a sentence if C is no usual multiple of N D, or if that of some runs is an exception.

    C / (N D) may change smoothly with N and D, as by causal attention or embeddings: by a quadratic
    of their logs, fitted by least absolute deviations; for fewer than 12 runs by their median.
    """
    x, z, y = np.log(n), np.log(d), np.log(c / n / d)
    trend: Array = np.full_like(y, np.median(y))
    if len(y) >= 12:
        x, z, w = x - x.mean(), z - z.mean(), np.ones_like(y)
        X = np.stack((np.ones_like(x), x, z, x * x, x * z, z * z), axis=1)
        for _ in range(50):  # reweighted least squares
            root = np.sqrt(w)[:, None]
            trend = X @ np.linalg.lstsq(X * root, y * root[:, 0], rcond=1e-9)[0]
            w = 1 / np.maximum(np.abs(y - trend), 1e-3)
    odd = np.abs(y - trend) > np.log(_ODD)
    if odd.mean() > 0.25:
        low, high = np.exp(np.quantile(y, [0.05, 0.95]))
        yield (
            f"C of the runs is {low:.3g} to {high:.3g} times N D, and no smooth function of them: "
            "N, D and C belong to different runs or are counted differently in some. Correct the "
            "columns."
        )
        return
    large = n >= np.quantile(n, 0.75)  # small ones have relatively more embeddings and attention
    usual = float(np.exp(np.median(trend[large])))
    if not _USUAL[0] <= usual <= _USUAL[1]:
        yield (
            f"C is {usual:.3g} N D for the largest models, where training costs about 6 N D and by "
            "no usual way to count less than 2 or more than 14. Check the units of N, D and C, and "
            "that D counts the tokens of all epochs."
        )
    if odd.any():
        worst = int(np.argmax(np.abs(y - trend)))
        yield (
            f"C of {_named(table, odd)} is not that of its N and D: at the worst "
            f"{np.exp(y[worst]):.3g} N D, where other runs have {np.exp(trend[worst]):.3g}. Check "
            "their N, D and C."
        )


def _perplexity(table: pd.DataFrame, points: Points, n: Array | None) -> Iterator[str]:
    """Yield a sentence if the loss of some runs, or of all, is a perplexity.

    The loss is then several times that of usual text at its N and D, and its logarithm is nearer.
    """
    if n is None or (d := points.tokens) is None:
        return
    a, alpha, b, beta, e = _USUAL_LAW
    usual = a * n**-alpha + b * d**-beta + e
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.abs(np.log(np.log(points.loss) / usual)) < np.abs(np.log(points.loss / usual))
    mask = (points.loss > _TOO_HIGH * usual) & near
    if mask.mean() >= 0.1:
        where = f"all {len(table)} runs" if mask.all() else _named(table, mask)
        yield (
            f"The loss of {where} looks like a perplexity: {points.loss[mask].min():.4g} to "
            f"{points.loss[mask].max():.4g}, where text has {usual[mask].min():.2g} to "
            f"{usual[mask].max():.2g} nats per token at these N and D. The law is one of nats: "
            "give the logarithm of a perplexity."
        )
