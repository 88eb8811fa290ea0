"""The band of a run's training loss, from its forecast, and how a run that goes on keeps to it.

    a forecast  -> Band     center and deviation of the log loss above its end, by share of steps
    the losses  -> Watch    how far the run is from the center, its end forecast anew, alarms

The model: at share x of the steps, log loss = log loss of the end + above(x) + v(x) + noise. The
error of the forecast end is normal, by its interval. v is a random walk backwards from the end,
whose variance at x is deviation(x)^2, so the newest losses tell all that is known of the end.

Invariant: a Watch depends on the losses alone, in their order, so that all ranks, and a run that
resumes from its `state`, conclude alike. Imports neither numpy nor torch.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist
from typing import Any

_BLOCKS = 200  # of a run: losses are judged as means of blocks of steps
_SIZES = 4, 16  # numbers of blocks of which the means are compared: 2 and 8 % of the run
_LEAST = 8  # blocks from which on the noise is known
_RECENT = 64  # blocks by which it is known
_LEVEL = 3.0  # deviations from the forecast that are outside; and from an earlier mean of the run,
_CHANGE = 4.5  # of which there are many
_PATIENCE = 4  # blocks in a row that are outside, before an alarm; and inside, to end it
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Band:
    """shares: of the steps, rising to 1; above: log training loss above that of the held-out text
    at the end; deviation: of `above`; loss, low, high, level: the forecast of the end."""

    shares: Sequence[float]
    above: Sequence[float]
    deviation: Sequence[float]
    loss: float
    low: float
    high: float
    level: float

    @property
    def begin(self) -> float:
        """The share of the steps from which on there is a band."""
        return self.shares[0]

    @property
    def width(self) -> float:
        """Half the interval in deviations of a normal distribution."""
        return _NORMAL.inv_cdf((1 + self.level) / 2)

    @property
    def end_deviation(self) -> float:
        """Standard deviation of the log loss at the end, by the forecast's interval."""
        return math.log(self.high / self.low) / 2 / self.width

    def at(self, share: float) -> tuple[float, float]:
        """Return center and deviation at a share of the steps, between two by a straight line."""
        i = min(max(1, bisect_left(self.shares, share)), len(self.shares) - 1)
        left, right = self.shares[i - 1 : i + 1]
        part = min(1.0, max(0.0, (share - left) / (right - left)))
        center, deviation = (
            x[i - 1] + part * (x[i] - x[i - 1]) for x in (self.above, self.deviation)
        )
        return center, deviation

    def losses(self, share: float) -> dict[str, float] | None:
        """Return low, center and high training loss at a share; None before the band begins."""
        if share < self.begin:
            return None
        above, deviation = self.at(share)
        half = self.width * math.hypot(self.end_deviation, deviation)
        sides = {"low": -half, "center": 0.0, "high": half}
        return {k: round(self.loss * math.exp(above + x), 6) for k, x in sides.items()}


@dataclass(frozen=True)
class Anew:
    """The end of a run, forecast from its losses so far. above: log of the smoothed loss over the
    center; loss, low, high: of the end; inside: probability that it is in the first interval."""

    above: float
    loss: float
    low: float
    high: float
    inside: float


@dataclass(frozen=True)
class Alarm:
    """The loss has left its band (or is back). beyond: log loss by which it is outside, negative
    below; since: the step; reference: the last step of the losses that it is compared with, None
    for the forecast."""

    left: bool
    since: int
    beyond: float
    reference: int | None


@dataclass
class Watch:
    """The losses of a run against its band. state: of a checkpoint, None at the beginning."""

    band: Band
    total_steps: int
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        begun = {"means": [], "ends": [], "sum": 0.0, "count": 0, "since": None, "inside": 0}
        self.state = {**begun, "alarm": None, "left": [], **self.state}
        self._size = -(-self.total_steps // _BLOCKS)

    def see(self, step: int, loss: float) -> Alarm | None:
        """Take the mean training loss of a step, in order; return an alarm that begins or ends."""
        share, s = step / self.total_steps, self.state
        if share < self.band.begin or not 0 < loss < math.inf:
            return None
        s["sum"] += math.log(loss / self.band.loss) - self.band.at(share)[0]
        s["count"] += 1
        if s["count"] < self._size:
            return None
        s["means"].append(s["sum"] / s["count"])
        s["ends"].append(step)
        s["sum"], s["count"] = 0.0, 0
        return self._judge(step)

    def copy(self) -> dict[str, Any]:
        """Return the state as it is now, for a checkpoint that is written in the background."""
        return deepcopy(self.state)

    def anew(self) -> Anew | None:
        """Return the forecast of the end by the losses so far; None while they are few."""
        if len(self.state["means"]) < _LEAST:
            return None
        band, prior = self.band, self.band.end_deviation
        count, noise = len(self.state["means"]), self._noise()
        means = ((*self._mean(count, size), size) for size in _SIZES if size <= count)
        parts = ((above, shape**2 + noise**2 / size) for above, shape, size in means)
        above, variance = min(parts, key=lambda part: part[1])
        part = prior**2 / (prior**2 + variance)
        deviation, center = math.sqrt(part * variance), math.log(band.loss) + part * above
        low, loss, high = (math.exp(center + side * band.width * deviation) for side in (-1, 0, 1))
        ends = (math.log(end) - center for end in (band.low, band.high))
        below, up_to = (_NORMAL.cdf(end / deviation) for end in ends)
        return Anew(above, loss, low, high, up_to - below)

    def _judge(self, step: int) -> Alarm | None:
        """Return the alarm that a block ends with, if one begins or ends with it."""
        s = self.state
        if len(s["means"]) < _LEAST:
            return None
        if s["alarm"]:
            return self._return(step)
        beyond, reference, bound = self._beyond()
        if not beyond:
            s["since"] = None
            return None
        first, count = s["since"] or (step, 0)
        s["since"] = [first, count + 1]
        if count + 1 < _PATIENCE:
            return None
        s["alarm"], s["inside"] = bound, 0
        return Alarm(True, first, beyond, reference)

    def _return(self, step: int) -> Alarm | None:
        """Return the end of an alarm, once the loss is back within the bound that it has left."""
        s = self.state
        size, level, bound = s["alarm"]
        is_outside = (self._mean(len(s["means"]), size)[0] - level) / bound > 1
        s["inside"] = 0 if is_outside else s["inside"] + 1
        if s["inside"] < _PATIENCE:
            return None
        first, s["since"], s["alarm"] = s["since"][0], None, None
        # These blocks, and those in which it began, are no measure for later ones.
        s["left"].append([first - _SIZES[-1] * self._size, step])
        return Alarm(False, first, 0.0, None)

    def _beyond(self) -> tuple[float, int | None, list[float]]:
        """Return by how much the newest losses are outside of the band, by the forecast or by the
        earlier losses, whichever tells it more clearly, 0 if they are inside; the last step of
        those losses; and the bound: the blocks of a mean, the level, the distance from it."""
        end, noise = self.band.end_deviation, self._noise()
        rough = (self.band.deviation[-1] / 2) ** 2  # the curve's own noise, which is no walk
        ends, count = self.state["ends"], len(self.state["means"])
        tests = list[tuple[float, float, int | None, int, float]]()
        for size in (n for n in _SIZES if n <= count and not self._was_outside(count, n)):
            newest, shape = self._mean(count, size)
            error = noise**2 / size
            bound = _LEVEL * math.sqrt(end**2 + shape**2 + error)
            tests.append((newest, bound, None, size, 0.0))
            for i in range(count - size, size - 1, -size):
                if self._was_outside(i, size):
                    continue
                before, wider = self._mean(i, size)
                walk = max(0.0, wider**2 - shape**2)
                bound = _CHANGE * math.sqrt(walk + 2 * (error + rough))
                tests.append((newest - before, bound, ends[i - 1], size, before))
        tests = tests or [(0.0, 1.0, None, 1, 0.0)]  # the first blocks after a return
        x, bound, reference, size, level = max(tests, key=lambda test: abs(test[0]) / test[1])
        beyond = math.copysign(abs(x) - bound, x) if abs(x) > bound else 0.0
        return beyond, reference, [size, level, math.copysign(bound, x)]

    def _was_outside(self, end: int, size: int) -> bool:
        """Return True if one of the `size` blocks before `end` belongs to an alarm that ended."""
        begun, ended = (self.state["ends"][i] for i in (end - size, end - 1))
        return any(first <= ended and begun <= last for first, last in self.state["left"])

    def _mean(self, end: int, size: int) -> tuple[float, float]:
        """Return the mean of `size` blocks before `end`, and the shape's deviation in their
        middle."""
        middle = self.state["ends"][end - 1 - size // 2] / self.total_steps
        return sum(self.state["means"][end - size : end]) / size, self.band.at(middle)[1]

    def _noise(self) -> float:
        """Return the deviation of a block's mean, from differences of neighbours."""
        means = self.state["means"][-_RECENT:]
        squares = [(b - a) ** 2 / 2 for a, b in pairwise(means)]
        return math.sqrt(sum(squares) / len(squares)) + 1e-9


def alarm_text(facts: Mapping[str, Any]) -> str:
    """Return the facts of the event forecast_left or forecast_back as a sentence."""
    if facts["kind"] == "forecast_back":
        return f"The loss is back in its band at step {facts['step']:,}."
    beyond, reference = math.expm1(facts["beyond"]), facts["reference"]
    side = "above" if beyond > 0 else "below"
    by = "the forecast" if reference is None else f"its own course up to step {reference:,}"
    return f"The loss is {abs(beyond):.1%} {side} its band since step {facts['since']:,}, by {by}."


def anew_text(facts: Mapping[str, Any], has_left: bool) -> str:
    """Return the facts of the event forecast_anew as a sentence. has_left: an alarm goes on."""
    above, level = math.expm1(facts["above"]), f"{100 * facts['level']:g} %"
    side, place = "above" if above > 0 else "below", "outside" if has_left else "inside"
    return (
        f"At step {facts['step']:,} the loss is {abs(above):.1%} {side} its forecast, {place} the "
        f"band; the end is forecast anew as {facts['loss']:.4f} ({level}: {facts['low']:.4f} to "
        f"{facts['high']:.4f}), {facts['inside']:.0%} inside the preregistered interval."
    )
