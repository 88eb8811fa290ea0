"""What it costs to be watched: what the training thread does for it in a step (marks, verdict,
hash of the windows, row), and the heartbeat thread beside it.

The marks of a step are made as the loop and the engine make them, and nothing else, so what is
timed is theirs alone. A rank beats in a thread of its own: its time counts against the training
only while it holds the interpreter, so a beat's time over its interval is an upper bound.
"""

import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.pairing import Result, interleaved

MICRO_BATCHES = 4
STEP = 0.1  # seconds: what the shares are of


@dataclass(frozen=True)
class Sizes:
    """How many of each are timed."""

    steps: int = 20_000
    heartbeats: int = 500
    verdicts: int = 5_000
    hashes: int = 2_000
    rows: int = 1_000


REAL, TOY = Sizes(), Sizes(20, 5, 20, 5, 5)


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    from forescale.config.sections.runtime import HeartbeatConfig
    from forescale.resilience.phases import PhaseTimer
    from forescale.resilience.reporter import HeartbeatReporter
    from forescale.run.directory import Attempt

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attempts" / "0001"
        path.mkdir(parents=True)
        settings = HeartbeatConfig()
        phases, mirrored = PhaseTimer("startup"), PhaseTimer("startup")
        reporter = HeartbeatReporter(mirrored, Attempt(path), 0, 1, settings)
        mirrored.mirror = reporter.node.mirror(0)
        marks = interleaved(
            rounds, lambda: _marks(mirrored, sizes.steps), lambda: _marks(phases, sizes.steps)
        )
        beats = [(_beats(reporter, sizes.heartbeats),) for _ in range(rounds)]
        rows = [
            (_verdicts(sizes.verdicts), _hashes(sizes.hashes), _rows(Attempt(path), sizes.rows))
            for _ in range(rounds)
        ]
        reporter.node.remove()
    share = sorted(row[0] for row in marks)[len(marks) // 2] / 1e6 / STEP
    every = settings.interval
    beat = sorted(row[0] for row in beats)[len(beats) // 2] / 1e6 / every
    labels = ("with the place mirrored", "without")
    facts = {"micro-batches": MICRO_BATCHES, "share of a 100 ms step": f"{share:.4%}"}
    bound = {"share of a core at one heartbeat a second": f"{beat:.4%}"}
    goal = "at most 1 % of a step with all else"
    middle = [sorted(column)[rounds // 2] for column in zip(*rows, strict=True)]
    names = ("a verdict", "the hash of the windows", "a row")
    medians = {f"{name} (us)": round(us, 1) for name, us in zip(names, middle, strict=True)}
    whole = sorted(row[0] for row in marks)[len(marks) // 2] + sum(middle)
    medians |= {
        f"with the marks, of a {s:.0f} ms step": f"{whole / s / 1e3:.3%}" for s in (65, 100)
    }
    return [
        Result(
            "guard, hash and row of a step",
            "us",
            ("all",),
            [(sum(r),) for r in rows],
            facts=medians,
        ),
        Result("marks of a step", "us", labels, marks, goal, facts),
        Result("a heartbeat", "us", ("beat",), beats, facts=bound),
    ]


def _marks(phases, steps: int) -> float:
    """Microseconds a step."""
    began = time.perf_counter()
    for _ in phases.each("data", range(steps)):
        phases.step += 1
        with phases("compute"):
            for _ in range(MICRO_BATCHES):
                phases.mark("forward")
                phases.mark("backward")
            phases.mark("norm")
            phases.mark("update")
        phases.take()
        phases.mark("summary")
        for phase in ("logging", "evaluation", "checkpoint"):
            with phases(phase):
                pass
    return (time.perf_counter() - began) / steps * 1e6


def _beats(reporter, count: int) -> float:
    """Microseconds each."""
    began = time.perf_counter()
    for _ in range(count):
        reporter._tick(0.0)
    return (time.perf_counter() - began) / count * 1e6


def _verdicts(count: int) -> float:
    """Microseconds each."""
    from forescale.config.sections.runtime import GuardConfig
    from forescale.train.guard import Guard

    guard, rng = Guard(GuardConfig()), random.Random(0)
    pairs = [(rng.gauss(4, 0.1), rng.gauss(1, 0.1)) for _ in range(count)]
    return _each(pairs, lambda step, pair: guard.judge(step, *pair))


def _hashes(count: int) -> float:
    """Of the default job's windows, microseconds a step."""
    import numpy as np

    from forescale.data.feed import window_hash

    windows = np.zeros((8, 257), np.uint16)
    return _each(range(count), lambda step, g: [window_hash(g, window) for window in windows])


def _rows(attempt, count: int) -> float:
    """Microseconds each, by the product's own part, with what the shared word told."""
    import psutil
    import torch

    from forescale.checkpoint.reader import Position
    from forescale.config.sections.batch import Cadence
    from forescale.engine.step import Facts
    from forescale.engine.world import StepSummary
    from forescale.train.callbacks import Every, Step
    from forescale.train.metrics import Metrics, Prices, ProgressLine

    process = psutil.Process()
    line = ProgressLine(Every(Cadence(10**6), 10**6), 10**6, 0, True)
    prices = Prices(full=6e6, causal=5e6, six_n=4e6, peak=1e12)
    rates = {"muon": 0.02, "decayed": 0.004, "undecayed": 0.004}
    memory = lambda: process.memory_info().rss  # noqa: E731
    metrics = Metrics(attempt, lambda step: (prices, prices), rates, line, [], memory, True)
    facts = Facts(torch.tensor([4.0]), 1.0, True)
    spent = {"data": 0.001, "compute": 0.06, "logging": 0.0002}

    def see(_, t: int) -> None:
        step = Step(Position(t, 8 * t, 2048 * t), 8 * t - 8, {"data": 2048}, 1.0, facts, spent)
        metrics.see(step, StepSummary(t, [8192.0], 1 << 60, False, False, 0.06 * t))

    return _each(range(1, count + 1), see)


def _each(items, work) -> float:
    items = list(items)
    began = time.perf_counter()
    for i, item in enumerate(items):
        work(i, item)
    return (time.perf_counter() - began) / len(items) * 1e6
