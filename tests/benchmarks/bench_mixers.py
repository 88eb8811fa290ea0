"""Mixers of equal parameters: speed and memory over the length, loss over compute and position.

    python tests/benchmarks/run.py mixers                        # all that model.mixer knows
    python tests/benchmarks/run.py mixers --mixers attention,lstm,mingru+attention

Speeds are of eager fp32 on one thread, by the processor's time, mixers in turns, the best of up to
three: other work on the machine only slows one down. Each mixer is trained with every learning
rate, and its best is shown: one seed, so a small difference means nothing. The first mixer is what
the others are compared with. The picture is runs/mixers.svg. Some minutes on two cores that do
nothing else.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from forescale.models import ModelConfig
from forescale.models.flops import count, flops_per_token
from forescale.models.mixers import MIXERS
from forescale.run.start import open_sources
from tests.benchmarks.draw_mixers import Panel, draw
from tests.benchmarks.mixers import Learning, Settings, Speed, crossings, learn, model_of, speeds
from tests.benchmarks.pairing import Result
from tests.benchmarks.processes import Side
from tests.benchmarks.sizes import TrainingSizes
from tests.benchmarks.training import make_job

PICTURE = Path("runs/mixers.svg")
Row = Mapping[str, Sequence[float]]  # of each mixer, the ys of a curve


@dataclass(frozen=True)
class Sizes:
    """mixers: names, as mixers.model_of takes them, with their settings; lengths: at which speed is
    measured, with a model of `speed`; the others: of the models that are trained, for as many FLOPs
    as the first mixer needs for training.steps, and of their scores."""

    mixers: tuple[str, ...]
    settings: Settings
    lengths: tuple[int, ...]
    speed: ModelConfig
    learning: ModelConfig
    training: TrainingSizes
    rates: tuple[float, ...]
    shares: tuple[float, ...]
    windows: int


def _training(
    steps: int, length: int, batch: int, *overrides: str, **options: bool
) -> TrainingSizes:
    words = (f"train.sequence_length={length}", f"train.global_batch={batch}")
    return TrainingSizes(steps, (*words, f"train.micro_batch={batch}", *overrides), **options)


REAL = Sizes(
    tuple(MIXERS),
    {"window": {"window": 128}},
    lengths=(256, 512, 1024, 2048, 4096, 8192, 16384),
    speed=ModelConfig(width=128, num_layers=2, vocab_size=256),
    learning=ModelConfig(width=64, num_layers=2),
    training=_training(160, 512, 8, "data=bytes"),
    rates=(3e-3, 1e-2),
    shares=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
    windows=48,
)
TOY = Sizes(
    tuple(MIXERS),
    {"window": {"window": 8}},
    lengths=(16, 32),
    speed=ModelConfig(width=32, num_layers=1, num_heads=2, vocab_size=32),
    learning=ModelConfig(width=32, num_layers=1, num_heads=2),
    training=_training(4, 16, 4, makes_data=True),
    rates=(3e-3,),
    shares=(0.5, 1.0),
    windows=2,
)


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    """Return a result for each quantity and length, share of the budget, or positions."""
    tables, results = _speeds(min(rounds, 3), sizes)
    panels = [*tables]
    tables, losses = _losses(sizes)
    panels += tables
    for panel in panels:
        _tell(panel)
    draw(panels, PICTURE)
    print(f"Drawn in {PICTURE}.")
    return results + losses


def _speeds(rounds: int, sizes: Sizes) -> tuple[list[Panel], list[Result]]:
    """Measure all mixers in turns, each in a process of its own."""
    longest = replace(sizes.speed, max_sequence_length=2 * max(sizes.lengths))
    configs = {name: model_of(name, longest, sizes.settings) for name in sizes.mixers}
    by_length: dict[int, list[list[Speed]]] = {}
    with ExitStack() as stack:
        arguments = (sizes.lengths, rounds)
        sides = [stack.enter_context(Side(speeds, c, *arguments)) for c in configs.values()]
        for length in sizes.lengths:
            for side in sides:
                side()  # warms up, and measures memory
            by_length[length] = [[side() for side in sides] for _ in range(rounds)]
    kinds = {
        "training": ("training step, tokens/s", "tokens/s"),
        "decoding": ("decoding with a cache, tokens/s", "tokens/s"),
        "peak": ("peak memory of a training step, MB", "MB"),
        "cache": ("cache of a sequence, MB", "MB"),
    }
    panels, results = [], []
    for kind, (title, unit) in kinds.items():
        rows = {
            n: [tuple(getattr(s, kind) for s in row) for row in by_length[n]] for n in by_length
        }
        results += [
            Result(f"{title.split(',')[0]}, {n} tokens", unit, sizes.mixers, rows[n])
            for n in by_length
        ]
        best = max if unit == "tokens/s" else min
        lines = {
            name: [best(row[i] for row in rows[n]) for n in by_length]
            for i, name in enumerate(sizes.mixers)
        }
        panels.append(Panel(title, "tokens of a sequence", sizes.lengths, lines))
    return panels, results


def _losses(sizes: Sizes) -> tuple[list[Panel], list[Result]]:
    """Train every mixer with every rate, and keep its best."""
    best: dict[str, Learning] = {}
    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), sizes.training)
        length = job.train.sequence_length
        vocabulary = open_sources(job.data).vocab_size
        base = replace(sizes.learning, vocab_size=vocabulary, max_sequence_length=2 * length)
        configs = {name: model_of(name, base, sizes.settings) for name in sizes.mixers}
        first = flops_per_token(configs[sizes.mixers[0]], length, causal=True)
        budget = first * sizes.training.steps * job.train.global_batch * length
        for name, config in configs.items():
            tried = [
                learn(config, job, rate, budget, sizes.shares, sizes.windows)
                for rate in sizes.rates
            ]
            best[name] = min(tried, key=lambda run: run.marks[sizes.shares[-1]])
            facts[name] = (
                f"{count(config).total:,} parameters, MLP {config.sizes.mlp_width} wide, "
                f"{best[name].tokens:,} tokens, best rate {best[name].rate} of {sizes.rates}"
            )
            print(f"{name}: {facts[name]}", flush=True)
    loss = {name: [run.marks[share] for share in sizes.shares] for name, run in best.items()}
    spent = [share * budget for share in sizes.shares]
    buckets = {name: [b.loss for b in run.positions] for name, run in best.items()}
    places = [(b.first, b.last) for b in best[sizes.mixers[0]].positions]
    panels = [
        Panel("held-out loss, nats a token", "FLOPs of training", spent, loss),
        Panel(
            f"loss by position, trained with {length} tokens", "position",
            [(first + last) / 2 for first, last in places], buckets, length,
        ),
    ]  # fmt: skip

    def result(name: str, lines: Row, at: int) -> Result:
        row = tuple(lines[mixer][at] for mixer in sizes.mixers)
        return Result(name, "nats a token", sizes.mixers, [row])

    results = [result(f"loss at {x:.2g} FLOPs", loss, i) for i, x in enumerate(spent)]
    results[-1].facts |= facts
    results += [
        result(f"loss at positions {a} to {b}", buckets, i) for i, (a, b) in enumerate(places)
    ]
    return panels, results


def _tell(panel: Panel) -> None:
    """Print the panel as a table, and where each line crosses the first one."""
    print(f"\n{panel.title}\n| {panel.across} | " + " | ".join(panel.lines) + " |")
    print("|" + "---|" * (1 + len(panel.lines)))

    def spoken(x: float) -> str:
        return f"{x:,.0f}" if 1000 <= x < 1e6 else f"{x:.4g}"

    for i, x in enumerate(panel.xs):
        print(f"| {spoken(x)} | " + " | ".join(spoken(ys[i]) for ys in panel.lines.values()) + " |")
    (first, reference), *others = panel.lines.items()
    for name, ys in others:
        at = [spoken(x) for x in crossings(panel.xs, ys, reference)]
        higher = "higher" if ys[-1] > reference[-1] else "lower"
        where = f"crosses {first} at {', '.join(at)}, and ends" if at else "is everywhere"
        print(f"{name} {where} {higher}.")
    print(flush=True)
