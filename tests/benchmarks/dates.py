"""What fine-tuning teaches: dates in numbers, written in words.

    python tests/benchmarks/dates.py make dates.jsonl
    python tests/benchmarks/dates.py score runs/quick runs/dates

`score` takes the runs, of which the last one was fine-tuned on the examples, and prints of each how
many held-out responses greedy decoding writes exactly, and their nats, with 95 % intervals.
"""

import datetime
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch

import forescale
from forescale.data.bin_kinds import ConversationKind
from forescale.data.bins import Bins

COUNT, DAYS, Z = 4_000, 73_000, 1.96


def make(path: Path) -> None:
    """Write the examples: days from 1900 on, each once."""
    first, lines = datetime.date(1900, 1, 1), []
    for day in random.Random(0).sample(range(DAYS), COUNT):
        date = first + datetime.timedelta(day)
        words = f"{date.day} {date:%B} {date.year}"
        lines.append({"prompt": f"Write {date} in words: ", "response": words})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def score(runs: list[str]) -> None:
    """Print a line for each run."""
    identity = forescale.open_run(runs[-1]).identity["dataset"]
    dataset = forescale.open_dataset(identity["path"])
    split = dataset.split("validation")
    columns = forescale.open_run(runs[-1]).config.train.sequence_length
    bins = Bins.open(ConversationKind(columns), split, dataset.identity, dataset.path.parent)
    pieces = [bins.pieces(s, i) for s, n in enumerate(bins.counts.tolist()) for i in range(n)]
    rows = [[split.read(0, *piece).astype(int).tolist() for piece in two] for two in pieces]
    for name in runs:
        print(f"{name}: {_scored(forescale.open_run(name).model(), rows)}")


@torch.no_grad()
def _scored(model: torch.nn.Module, rows: list[list[list[int]]]) -> str:
    right, nats = 0, []
    for prompt, response in rows:
        logits = model(torch.tensor([prompt + response[:-1]]))[0, len(prompt) - 1 :]
        labels = torch.tensor(response)
        # Greedy decoding writes a response if each token is the likeliest after those before it.
        right += int((logits.argmax(-1) == labels).all())
        nats.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
    n, share = len(rows), right / len(rows)
    middle, scale = share + Z**2 / 2 / n, 1 + Z**2 / n  # Wilson's interval
    half = Z * math.sqrt(share * (1 - share) / n + (Z / 2 / n) ** 2)
    low, high = (middle - half) / scale, (middle + half) / scale
    error = Z * np.std(nats, ddof=1) / math.sqrt(n)
    return (
        f"{right} of {n} exact ({low:.3f} to {high:.3f}), "
        f"{np.mean(nats):.3f} ± {error:.3f} nats a response"
    )


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        score(sys.argv[2:])
