"""Alarms of runs that are compared with the band of their forecast: false ones, and how soon.

Each study is simulated: 15 finished runs of five sizes, and one of 10 times the compute of the most
expensive of them, whose curve is forecast from theirs. Losses follow a law of N, of the sum of the
learning rates so far and of how far the rate has decayed (in the manner of arXiv 2408.11029); every
run has exponents of its own, 2 % around the law's, and noise of which the neighbouring steps share
a part. The forecast of the end errs as its interval says (90 %: 2 % to each side).

Faults begin between 30 and 60 % of the steps. rate: it is halved; order: a badly shuffled source
comes in waves of 3 % each 5 % of the steps; text: 15 % of the steps read other text, with a loss
4 % higher, and teach nothing; level: the loss is higher from there on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from forescale.run.band import Band, Watch
from forescale.scaling.fitting.points import Array
from forescale.scaling.forecasting.curve import Curve, shape_of, smoothed
from tests.benchmarks.pairing import Result

HALF = 0.02  # the interval of the end, to each side
LARGER = 10.0  # the compute of the run over that of the most expensive finished one
NEVER = float("inf")


@dataclass(frozen=True)
class Sizes:
    """healthy, faulty: simulated runs, those with a fault for each of them; steps: of a run;
    noises: of the log loss of a step."""

    healthy: int
    faulty: int
    steps: int
    noises: tuple[float, ...]


REAL, TOY = Sizes(1000, 200, 2000, (0.03, 0.01)), Sizes(3, 2, 400, (0.01,))


@dataclass
class Fault:
    """The change of a run from the share `begin` of its steps on. rate: factor of the learning
    rate; extra: log loss at each share; idle: length of a part in which nothing is learned."""

    begin: float = NEVER
    rate: float = 1.0
    extra: Callable[[Array], Array] = np.zeros_like
    idle: float = 0.0


def level(size: float) -> Callable[[float], Fault]:
    return lambda begin: Fault(begin, extra=lambda x: np.where(x > begin, size, 0.0))


def waves(begin: float) -> Fault:
    return Fault(begin, extra=lambda x: 0.03 * np.sin((x - begin) * 2 * np.pi / 0.05) * (x > begin))


def worse_text(begin: float) -> Fault:
    end = begin + 0.15
    return Fault(begin, extra=lambda x: np.where((x > begin) & (x < end), 0.04, 0.0), idle=0.15)


FAULTS: dict[str, Callable[[float], Fault]] = {
    "level 1 % higher": level(0.01),
    "level 3 % higher": level(0.03),
    "rate halved": lambda begin: Fault(begin, rate=0.5),
    "badly shuffled": waves,
    "worse text": worse_text,
}


class Training:
    """Simulated trainings with the learning rate of `wsd`."""

    def __init__(self, seed: int, steps: int, noise: float):
        self.rng, self.steps, self.noise = np.random.default_rng(seed), steps, noise

    def losses(self, n: float, d: float, fault: Fault | None = None) -> tuple[Array, float]:
        """Return the training losses of a run, and the held-out loss at its end."""
        rng, fault = self.rng, fault or Fault()
        shares = np.arange(1, self.steps + 1) / self.steps
        alpha, beta = 0.3 * np.exp(0.02 * rng.standard_normal(2))
        gain = 0.25 * np.exp(0.05 * rng.standard_normal())
        rate = np.minimum(1, (1 - shares) / 0.2) * np.where(shares > fault.begin, fault.rate, 1.0)
        drop = np.convolve(1 - rate, np.full(k := self.steps // 50, 1 / k))[: self.steps]
        idle = (shares > fault.begin) & (shares < fault.begin + fault.idle)
        learned = np.cumsum(np.where(idle, 0.0, rate)) * d / self.steps
        pure = 1.5 + 20 * n**-alpha + 60 * learned**-beta * (1 - gain * drop)
        scatter = rng.standard_normal(self.steps)
        scatter[1:] = 0.95 * scatter[1:] + 0.3 * scatter[:-1]  # neighbours share a part
        return pure * np.exp(fault.extra(shares) + self.noise * scatter), float(pure[-1])


def watched(seed: int, sizes: Sizes, noise: float, planted: str | None = None) -> float | None:
    """Return how many steps a run had made, as a share of all, from its fault (or its beginning)
    to the first alarm; None without one."""
    training = Training(seed, sizes.steps, noise)
    shares = np.arange(1, sizes.steps + 1) / sizes.steps
    curves = []
    for n in np.geomspace(2e5, 2e6, 5):
        for ratio in (10, 20, 40):
            losses, end = training.losses(n, ratio * n)
            curves.append(Curve(n, ratio * n, *smoothed(shares, losses, end)))
    n = 2e6 * LARGER**0.5
    shape = shape_of(curves, n, 20 * n)
    assert shape is not None
    begin = training.rng.uniform(0.3, 0.6) if planted else 0.0
    state = training.rng.bit_generator.state
    healthy, end = training.losses(n, 20 * n)
    training.rng.bit_generator.state = state
    losses = training.losses(n, 20 * n, FAULTS[planted](begin))[0] if planted else healthy
    predicted = end * np.exp(np.log1p(HALF) / 1.645 * training.rng.standard_normal())
    columns = (column.tolist() for column in (shape.shares, shape.above, shape.deviation))
    interval = predicted / (1 + HALF), predicted * (1 + HALF)
    watch = Watch(Band(*columns, predicted, *interval, 0.9), sizes.steps)
    for step, loss in enumerate(losses.tolist(), 1):
        alarm = watch.see(step, loss)
        if alarm and alarm.left and step / sizes.steps > begin:
            return step / sizes.steps - begin
    return None


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    """Return and print the false alarms, and for each fault the alarms and their median delay;
    `rounds` is unused, since nothing is timed."""
    print(f"{sizes.steps:,} steps; delay: from the fault, as a share of the steps")
    print("| kind and noise of a step | runs | with an alarm | median delay |\n|---|---|---|---|")
    results = []
    for noise in sizes.noises:
        for kind in (None, *FAULTS):
            count = sizes.faulty if kind else sizes.healthy
            delays = [watched(seed, sizes, noise, kind) for seed in range(count)]
            alarms = [delay for delay in delays if delay is not None]
            share, name = len(alarms) / count, f"{kind or 'healthy'}, noise {noise:.0%}"
            median = float(np.median(alarms)) if alarms else None
            late = f"{median:.1%}" if kind and median is not None else "-"
            print(f"| {name} | {count} | {share:.1%} | {late} |", flush=True)
            facts = {"runs": count, "median_delay": median}
            results.append(Result(name, "", ("share with an alarm",), [(share,)], "", facts))
    return results
