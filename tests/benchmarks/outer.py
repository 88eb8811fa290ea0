"""Held-out losses of one run on two clusters beside one cluster at equal tokens: python
tests/benchmarks/outer.py [--steps N] [--seeds A,B] [--every A,B] [WORD ...]

One cluster has the batch of both members, so it reads the same windows at the same steps. Members
are two processes on this machine; words are further keys of all runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BATCH = 8  # windows of a member's step
ALL = ("experiment=quick", "launch.processes=1", "validation.every=10%", "validation.windows=512")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=lambda s: [*map(int, s.split(","))], default=[1, 2, 3])
    parser.add_argument("--every", type=lambda s: [*map(int, s.split(","))], default=[20, 50])
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    differences: dict[int, list[float]] = {every: [] for every in options.every}
    for seed in options.seeds:
        words = [*ALL, "train.tokens=null", f"train.steps={options.steps}", f"train.seed={seed}"]
        words += ["checkpoint.every=1000000", *options.words]
        one = losses(words, [[f"train.global_batch={2 * BATCH}"]])
        print(f"seed {seed}, one cluster: {text(one)}", flush=True)
        for every in options.every:
            names = [f"outer.every={every}", "outer.members=[a,b]", f"train.global_batch={BATCH}"]
            two = losses(words, [[*names, f"outer.member={member}"] for member in "ab"])
            print(f"seed {seed}, two members every {every}: {text(two)}", flush=True)
            differences[every].append([*two.values()][-1] - [*one.values()][-1])
    for every, each in differences.items():
        numbers = ", ".join(f"{number:+.4f}" for number in each)
        print(f"every {every}: {statistics.mean(each):+.4f} nats ({numbers})")


def text(losses: dict[int, float]) -> str:
    return ", ".join(f"{step} {loss:.4f}" for step, loss in losses.items())


def losses(words: list[str], members: list[list[str]]) -> dict[int, float]:
    """Train a run, each of its members in a process; return the first one's held-out losses by
    step."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for i, member in enumerate(members):
            where = [f"run.root={folder}", f"run.name=run{i}"]
            where += [f"outer.store={folder}/store"] * (len(members) > 1)
            command = [sys.executable, "-P", "-m", "forescale", "train", *words, *member, *where]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            quiet = {"stdout": subprocess.DEVNULL, "env": environment}
            started.append(subprocess.Popen(command, **quiet))
        assert [process.wait() for process in started] == [0] * len(members)
        lines = (Path(folder) / "run0/metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "validation"]
        return {row["step"]: row["loss"] for row in rows if row["dataset"] == "validation"}


if __name__ == "__main__":
    main()
