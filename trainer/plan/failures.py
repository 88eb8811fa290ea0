"""The cost of failures in a job of many nodes, in closed form, and the best checkpoint interval.

Invariant: pure functions; all times are in seconds. Failures are assumed to be independent and to
have a constant rate, as in Young 1974 and Daly 2006. Repeated failures of one faulty node are not
independent and cost more.
"""

import math
from dataclasses import dataclass

from forescale.monitor.goodput import optimal_interval

_DAY = 86_400.0
# Seconds. Collectives, a pause of the kernels and the locking of pages: few saves stall for less.
_LEAST_STALL = 1.0


@dataclass(frozen=True)
class FailureEstimate:
    """Failures and their cost for a job on `nodes` nodes; all times in seconds.

    mtbf: mean time between failures of the job. restart: from a failure until the job trains again.
    stall: time for which a save pauses training. interval: training between two saves. best: the
    interval that loses the least time (Daly 2006, eq. 37). young: its first-order approximation
    (Young 1974). ettr: effective training time ratio at `interval`, the expected fraction of the
    wall time that is training which is not lost. best_ettr: the same at `best`.
    """

    nodes: int
    mtbf: float
    restart: float
    stall: float
    interval: float
    best: float
    young: float
    ettr: float
    best_ettr: float


def stall_of(copying: float, writing: float, in_background: bool) -> float:
    """Return the seconds for which a save pauses training. copying: of the state to memory of the
    host; writing: of the files; in_background: training goes on while they are written."""
    copied = max(_LEAST_STALL, copying)
    return copied if in_background else copied + writing


def mtbf(nodes: int, failures_per_1000_node_days: float) -> float:
    """Return the mean seconds between failures of a job; inf if the failure rate is 0.

    A failure of any node ends the job.
    """
    rate = nodes * failures_per_1000_node_days / 1000 / _DAY
    return 1 / rate if rate else math.inf


def ettr(interval: float, stall: float, restart: float, mean: float) -> float:
    """Return the expected effective training time ratio: seconds of kept training per wall second.

    Source: Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart
    dumps", eq. 20. It includes failures within an interval and failures during a restart.
    """
    if math.isinf(mean):
        return interval / (interval + stall)
    exponent = (interval + stall) / mean
    if exponent + restart / mean > 700:  # the job almost never completes an interval
        return 0.0
    return interval / (mean * math.exp(restart / mean) * math.expm1(exponent))


def estimate_failures(
    nodes: int,
    failures_per_1000_node_days: float,
    stall: float,
    restart: float,
    interval: float,
    shortest: float = 0.0,
) -> FailureEstimate:
    """Return the FailureEstimate of a job on `nodes` nodes; all times in seconds.

    shortest: the smallest possible interval; a save begins only after the previous one is written.
    """
    mean = mtbf(nodes, failures_per_1000_node_days)
    if math.isinf(mean):
        alone = ettr(interval, stall, restart, mean)
        return FailureEstimate(
            nodes, mean, restart, stall, interval, interval, interval, alone, alone
        )
    best = max(optimal_interval(stall, mean), shortest)
    return FailureEstimate(
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
