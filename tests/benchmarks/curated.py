"""Losses of a model that was trained on what a curation keeps, beside those of one that was trained
on as many tokens of the whole text:
python tests/benchmarks/curated.py POOL TARGET [--curate text] [--tokens N] [--seeds A,B] [WORD ...]

POOL, TARGET: inputs of `forescale shards`. TARGET judges both: good text of another origin. Both
have the tokenizer of the whole text; a seed decides the windows that a run reads, their order and
its first weights. Words are further keys of all runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import t


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--curate", default="text")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=float, default=700_000)
    parser.add_argument("--seeds", type=seeds_of, default=[1, 2, 3])
    parser.add_argument("words", nargs="*")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def seeds_of(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def compare(options: argparse.Namespace, folder: Path) -> None:
    pool, target = options.pool.resolve(), options.target.resolve()
    same = f"tokenizer={folder / 'whole/tokenizer.json'}"
    forescale(folder, "shards", pool, "output=whole", f"vocab_size={options.vocabulary}")
    forescale(folder, "shards", pool, "output=curated", same, f"curate={options.curate}")
    forescale(folder, "shards", target, "output=target", same, "validation_fraction=0.5")
    sides = "whole", "curated"
    for side in sides:
        splits = json.loads((folder / side / "manifest.json").read_text())["splits"]
        print(f"{side}: {splits['train']['tokens']:,} tokens", flush=True)
    differences = []
    for seed in options.seeds:
        bits = [score(options, folder, side, seed) for side in sides]
        differences.append(bits[1] - bits[0])
        both = " and ".join(f"{value:.4f}" for value in bits)
        print(f"seed {seed}: {both} bits per byte of the target", flush=True)
    mean, n = np.mean(differences), len(differences)
    half = t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / n**0.5 if n > 1 else np.inf
    print(f"curated: {mean:+.4f} ± {half:.4f} (95 %, {n} seeds) bits per byte")


def score(options: argparse.Namespace, folder: Path, side: str, seed: int) -> float:
    """Return the bits per byte of the target, of a run on `side`."""
    run = f"{side}-{seed}"
    data = ["data=dataset", f"data.path={folder / side}"]
    length = [f"train.tokens={options.tokens:.0f}", f"train.seed={seed}"]
    names = [f"run.root={folder / 'runs'}", f"run.name={run}"]
    forescale(folder, "train", "experiment=first", *names, *data, *length, *options.words)
    path = folder / "runs" / run
    answer = forescale(folder, "eval", path, f"data.path={folder / 'target'}", "json=true")
    return float(json.loads(answer.splitlines()[-1])["bits_per_byte"])


def forescale(folder: Path, *words: object) -> str:
    """Return what a command prints. A command that fails ends this one, with what it said."""
    command = [sys.executable, "-m", "forescale", *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
