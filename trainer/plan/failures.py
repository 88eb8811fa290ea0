"""What failures cost a job of many nodes, in closed form: how often, how much, how often to save.

Invariant: pure functions of stated numbers; seconds everywhere. Failures are independent and of a
constant rate, as in Young 1974 and Daly 2006: those of a bad node that fails again and again are
not, and cost more.
"""

import math
from dataclasses import dataclass

from forescale.monitor.goodput import optimal_interval

_DAY = 86_400.0


@dataclass(frozen=True)
class Outlook:
    """Of a job on `nodes` nodes. mtbf: mean seconds between failures of the job; restart: seconds
    from a failure until it trains again; stall: seconds of training that a save costs; interval:
    of training between two saves; best: the one that loses least (Daly 2006, eq. 37), young: its
    first order (Young 1974); ettr: the expected share of the time that is training that counts, at
    `interval`; best_ettr: at `best`."""

    nodes: int
    mtbf: float
    restart: float
    stall: float
    interval: float
    best: float
    young: float
    ettr: float
    best_ettr: float


def mtbf(nodes: int, failures_per_1000_node_days: float) -> float:
    """Mean seconds between failures of a job that any node's failure ends; inf for none."""
    rate = nodes * failures_per_1000_node_days / 1000 / _DAY
    return 1 / rate if rate else math.inf


def ettr(interval: float, stall: float, restart: float, mean: float) -> float:
    """Effective training time ratio: seconds of training that count over seconds of wall clock,
    expected. Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart
    dumps", eq. 20: of each interval, whole failures within it and within restarts included."""
    if math.isinf(mean):
        return interval / (interval + stall)
    exponent = (interval + stall) / mean
    if exponent + restart / mean > 700:  # it hardly ever gets so far
        return 0.0
    return interval / (mean * math.exp(restart / mean) * math.expm1(exponent))


def outlook(
    nodes: int,
    failures_per_1000_node_days: float,
    stall: float,
    restart: float,
    interval: float,
    shortest: float = 0.0,
) -> Outlook:
    """shortest: no save can begin before the one before it is done, so many seconds later."""
    mean = mtbf(nodes, failures_per_1000_node_days)
    if math.isinf(mean):
        alone = ettr(interval, stall, restart, mean)
        return Outlook(nodes, mean, restart, stall, interval, interval, interval, alone, alone)
    best = max(optimal_interval(stall, mean), shortest)
    return Outlook(
        nodes,
        mean,
        restart,
        stall,
        interval,
        best,
        math.sqrt(2 * stall * mean),
        ettr(interval, stall, restart, mean),
        ettr(best, stall, restart, mean),
    )
