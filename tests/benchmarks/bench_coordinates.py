"""What a parametrisation holds the same from one size to the next: activations and their updates
(the slopes are printed, the curves drawn in runs/coordinates.html) and the best learning rate.

Nothing here is timed: a row is a seed, of which there are two at most. Some ten minutes.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from forescale.config.sections.optimizer import AdamWConfig
from forescale.models import Transformer
from forescale.models.choices import PARAMETRIZATIONS
from forescale.pages.document import Section, render
from forescale.pages.figure import Axis, Figure, line
from tests.benchmarks.coordinates import (
    ADAMW,
    LAYERS,
    MUON,
    Coordinates,
    model_of,
    optimizers,
    over,
    slopes,
)
from tests.benchmarks.pairing import Result

PICTURE = Path("runs/coordinates.html")
WARMUP, LENGTH, WINDOWS, HELD_OUT = 10, 64, 16, 200_000


@dataclass(frozen=True)
class Sizes:
    """Over which widths and depths activations are measured, after so many updates; at which widths
    which learning rates are tried, each for so many steps."""

    width: tuple[int, ...]
    depth: tuple[int, ...]
    updates: int
    widths: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int


REAL = Sizes(
    width=(64, 128, 256, 512, 1024), depth=(2, 4, 8, 16, 32), updates=8,
    widths=(64, 256), rates=tuple(2.0**-n for n in range(11, 3, -1)), steps=100,
)  # fmt: skip
TOY = Sizes(width=(64, 80), depth=(1, 2), updates=1, widths=(64,), rates=(2**-8,), steps=WARMUP + 1)


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    return [*activations(min(rounds, 2), sizes), *learning_rates(sizes)]


def activations(seeds: int, sizes: Sizes) -> Iterator[Result]:
    """The slope of each layer over width and depth, and their picture."""
    curves = {}
    axes = {"width": sizes.width, "depth": sizes.depth}
    for settings, (axis, values) in product((ADAMW, MUON), axes.items()):
        for kind in PARAMETRIZATIONS:
            sizes_of = over(axis, values, kind, settings, seeds, sizes.updates)
            title = f"{settings.kind}, {kind}, {axis}"
            curves[title] = sizes_of
            for measure in ("size", "move"):
                row = tuple(slopes(sizes_of, measure).values())
                yield Result(f"slope of {measure}, {title}", "", LAYERS, [row])
    draw(curves)


def learning_rates(sizes: Sizes) -> Iterator[Result]:
    """The best of the rates at each of the widths."""
    for kind in ("standard", "mup"):
        losses = {
            width: [final_loss(kind, width, rate, sizes.steps) for rate in sizes.rates]
            for width in sizes.widths
        }
        labels = tuple(f"width {width}" for width in sizes.widths)
        best = tuple(sizes.rates[row.index(min(row))] for row in losses.values())
        tried = [f"{rate:.5f}" for rate in sizes.rates]
        facts = {
            f"losses, width {w}": dict(zip(tried, row, strict=True)) for w, row in losses.items()
        }
        yield Result(f"best learning rate, {kind}", "", labels, [best], "", facts)


def draw(curves: dict[str, dict[int, list[Coordinates]]]) -> None:
    """How far each layer has moved against size: a section a title, a chart a layer, a line a
    step."""
    sections = []
    for title, seeds_of in curves.items():
        charts = []
        for layer in LAYERS:
            chart = Figure(Axis("size", log=True), Axis(layer, log=True), height=240)
            moves = [of_seed[0].move[layer] for of_seed in seeds_of.values()]
            for step, ys in list(enumerate(zip(*moves, strict=True)))[1:]:
                shade = f"#1f77b4{round(255 * (0.2 + 0.8 * step / len(moves[0]))):02x}"
                texts = [f"step {step}"] * len(ys)
                chart.add(line(np.array([*seeds_of]), np.array(ys), shade, texts=texts))
            charts.append((f"chart-{len(sections)}-{layer}", chart, ""))
        sections.append(Section(f"section-{len(sections)}", title, charts))
    heading = "Mean |activation - initial| after each update: flat is what transfers"
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(render(title=heading, sections=sections))
    print(f"Drawn in {PICTURE}.")


def final_loss(parametrization: str, width: int, rate: float, steps: int) -> float:
    """Nats a byte on windows that were held out, after `steps` updates on the source of Python's
    library: warm-up, then linear to nothing."""
    config = model_of(parametrization, width, vocab_size=256, max_sequence_length=LENGTH)
    torch.manual_seed(0)
    model = Transformer(config)
    built = optimizers(model, AdamWConfig(learning_rate=rate))
    groups = [(group, group["lr"]) for o in built for group in o.param_groups]
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x, y = windows(_text()[:-HELD_OUT], WINDOWS, generator)
        (model(x, y).sum() / y.numel()).backward()
        for group, peak in groups:
            group["lr"] = peak * min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
        for optimizer in built:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        x, y = windows(_text()[-HELD_OUT:], 64, generator.manual_seed(1))
        return (model(x, y).sum() / y.numel()).item()


def windows(text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets, (count, LENGTH) each, from anywhere in the text."""
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=generator)
    rows = text[starts + torch.arange(LENGTH + 1)].long()
    return rows[:, :-1], rows[:, 1:]


@cache
def _text() -> Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
