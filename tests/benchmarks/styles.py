"""What preferences teach: dates in numbers, of two styles that people use, the preferred one.

    python tests/benchmarks/styles.py make examples.jsonl preferences.jsonl
    python tests/benchmarks/styles.py score runs/styles runs/preferred

Half of the examples write a date as 2038-04-01, half as 01/04/2038; the preferences choose the
first. `score` draws a response to each held-out prompt of the last run's preferences (temperature
1) and prints of each run how many are a date in the preferred style, how many in the other, and how
many the right date in either, with 95 % intervals.
"""

import datetime
import json
import math
import random
import re
import sys
from pathlib import Path

import forescale

EXAMPLES, PREFERENCES, DAYS, Z = 3_000, 1_000, 73_000, 1.96
FORMATS = {"chosen": "%Y-%m-%d", "rejected": "%d/%m/%Y"}
_STYLES = {
    "chosen": re.compile(r"\d{4}-\d\d-\d\d"),
    "rejected": re.compile(r"\d\d/\d\d/\d{4}"),
}
_PROMPT = re.compile(r"Write (\d+ \w+ \d+) in numbers: ")


def make(examples: Path, preferences: Path) -> None:
    """Write both files: days from 1900 on, each once."""
    draw, first = random.Random(0), datetime.date(1900, 1, 1)
    days = draw.sample(range(DAYS), EXAMPLES + PREFERENCES)
    lines = []
    for i, day in enumerate(days):
        date = first + datetime.timedelta(day)
        sides = {side: f"{date:{form}}" for side, form in FORMATS.items()}
        prompt = {"prompt": f"Write {date.day} {date:%B} {date.year} in numbers: "}
        response = {"response": sides[draw.choice([*FORMATS])]}
        lines.append(prompt | (response if i < EXAMPLES else sides))
    for path, part in ((examples, lines[:EXAMPLES]), (preferences, lines[EXAMPLES:])):
        path.write_text("".join(json.dumps(line) + "\n" for line in part))


def score(runs: list[str]) -> None:
    """Print a line for each run."""
    prompts = _held_out(runs[-1])
    for name in runs:
        texts = forescale.open_run(name).generate(
            prompts, num_tokens=24, temperature=1.0, top_k=None, seed=0, batch=64
        )
        counts = dict.fromkeys([*FORMATS, "right"], 0)
        for prompt, text in zip(prompts, texts, strict=True):
            date = datetime.datetime.strptime(_PROMPT.fullmatch(prompt)[1], "%d %B %Y").date()
            response = text.removeprefix(prompt).strip()
            for side, form in FORMATS.items():
                counts[side] += bool(_STYLES[side].fullmatch(response))
                counts["right"] += response == f"{date:{form}}"
        shares = (f"{n} {side} ({_interval(n, len(prompts))})" for side, n in counts.items())
        print(f"{name}: of {len(prompts)} responses {', '.join(shares)}")


def _held_out(run: str) -> list[str]:
    """Return the prompts of the preferences that a run has held out."""
    view = forescale.open_run(run)
    dataset = forescale.open_dataset(view.config.data.path)
    split, rows = dataset.split("validation"), []
    for shard, size in enumerate(split.shard_tokens):
        text = view.tokenizer.decode(split.read(shard, 0, size).tolist())
        rows += _PROMPT.findall(text)[::2]  # each prompt stands before both responses
    return [f"Write {date} in numbers: " for date in rows]


def _interval(right: int, n: int) -> str:
    """Return Wilson's interval of a share."""
    share, scale = right / n, 1 + Z**2 / n
    middle, half = share + Z**2 / 2 / n, Z * math.sqrt(share * (1 - share) / n + (Z / 2 / n) ** 2)
    return f"{(middle - half) / scale:.3f} to {(middle + half) / scale:.3f}"


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(*map(Path, sys.argv[2:]))
    else:
        score(sys.argv[2:])
