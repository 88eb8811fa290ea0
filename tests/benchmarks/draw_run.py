"""Draws the loss of a run as SVG: python tests/benchmarks/draw_run.py RUN [FILE]

Reads RUN/metrics.jsonl alone; FILE is tests/benchmarks/first-run.svg unless given. The same rows
give the same bytes with one version of matplotlib.
"""

import json
import sys
from pathlib import Path

import matplotlib
import pandas as pd

_MEDIAN = 25  # steps of the running median, centred
GREY, BLUE, RED = "#b8b8b8", "#1f5fa8", "#c23b22"


def draw(run: Path, output: Path) -> None:
    """Draw the training loss of every step and the validation loss; raises OSError for no rows."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "forescale"
    from matplotlib import pyplot as plt

    rows = pd.DataFrame(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    train, held_out = (rows[rows.kind == kind] for kind in ("train", "validation"))
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(train.tokens / 1e6, train.loss, ".", ms=1.5, color=GREY, rasterized=True)
    middle = train.loss.rolling(_MEDIAN, center=True, min_periods=1).median()
    axes.plot(train.tokens[::5] / 1e6, middle[::5], color=BLUE, lw=1.2, label="training")
    axes.plot(held_out.tokens / 1e6, held_out.loss, "o", color=RED, ms=5, label="held-out files")
    axes.set(xlabel="million tokens", ylabel="loss, nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output, dpi=150, metadata={"Date": None})


if __name__ == "__main__":
    here = Path(__file__).parent / "first-run.svg"
    draw(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else here)
