"""Held-out losses of one run on two clusters beside one cluster at equal tokens, each tuned by as
many trials: python tests/benchmarks/outer.py [--steps N] [--trunk N] [--seeds A,B] [--rounds A,B+C]
[WORD ...]

One cluster has the batch of both members, so it reads the same windows at the same steps. On seed 0
it tries --rates, then two members at the best of them try --outer, each a rate and a momentum, at
the first of --rounds (every A steps, or every B with an overlap of C). --trunk: all begin with the
weights of one cluster after so many steps. Members are two processes on this machine; words are
further keys of all runs.
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
ALL = [
    *("experiment=quick", "launch.processes=1", "train.tokens=null", "checkpoint.every=1000000"),
    *("model.num_layers=2", "model.width=64", "model.num_heads=2", "train.sequence_length=64"),
    *("train.compile=off", "guard.replay=null", "logging.peak_flops=1e11", "optimizer=adamw"),
    *("validation.every=1000000", "schedule.warmup='5 %'", f"train.global_batch={BATCH}"),
]
ONE = f"train.global_batch={2 * BATCH}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--trunk", type=int, default=0)
    parser.add_argument("--seeds", type=listed(int), default=[1, 2, 3])
    parser.add_argument("--rounds", type=listed(str), default=["20", "50", "50+10"])
    parser.add_argument("--rates", type=listed(float), default=[0.002, 0.004, 0.008, 0.016])
    outer = ["0.7/0.9", "0.7/0.5", "1/0", "1/0.5"]
    parser.add_argument("--outer", type=listed(str), default=outer)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    bench = Bench(options.steps, options.trunk, options.words)

    rates = {r: bench.one(0, [f"optimizer.learning_rate={r}"]) for r in options.rates}
    best = f"optimizer.learning_rate={min(rates, key=rates.__getitem__)}"
    print(f"seed 0, one cluster, by learning rate: {text(rates)}", flush=True)
    outers = {o: bench.two(0, [best], options.rounds[0], o) for o in options.outer}
    outer = min(outers, key=outers.__getitem__)
    print(f"seed 0, two members every {options.rounds[0]}, by outer: {text(outers)}", flush=True)
    differences: dict[str, list[float]] = {rounds: [] for rounds in options.rounds}
    ones = []
    for seed in options.seeds:
        ones.append(bench.one(seed, [best]))
        twos = {rounds: bench.two(seed, [best], rounds, outer) for rounds in options.rounds}
        print(f"seed {seed}, one cluster: {ones[-1]:.4f}, two members: {text(twos)}", flush=True)
        for rounds, loss in twos.items():
            differences[rounds].append(loss - ones[-1])
    print(f"one cluster: {spread(ones)} nats")
    for rounds, each in differences.items():
        print(f"two members every {rounds}, outer {outer}: {spread(each, '+')} nats to it")


def listed(kind: type):
    return lambda words: [kind(word) for word in words.split(",")]


def text(losses: dict) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.4f} (standard deviation {deviation:.4f})"


class Bench:
    """Runs of some steps, of a seed each, that begin with the weights of a trunk, if it has
    steps."""

    def __init__(self, steps: int, trunk: int, words: list[str]):
        self.steps, self.trunk, self.words = steps, trunk, words
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0

    def one(self, seed: int, words: list[str]) -> float:
        """Return the held-out loss of a run on one cluster."""
        return self._train(seed, [[*words, ONE]])

    def two(self, seed: int, words: list[str], rounds: str, outer: str) -> float:
        """Return that of a run of two members."""
        every, _, overlap = rounds.partition("+")
        rate, _, momentum = outer.partition("/")
        words = [*words, f"outer.every={every}", f"outer.overlap={overlap or 0}"]
        words += [f"outer.learning_rate={rate}", f"outer.momentum={momentum}"]
        words += ["outer.members=[a,b]", f"outer.store={self._folder.name}/store{self._count}"]
        return self._train(seed, [[*words, f"outer.member={member}"] for member in "ab"])

    def _train(self, seed: int, members: list[list[str]]) -> float:
        words = [*ALL, f"train.steps={self.steps}", f"train.seed={seed}"]
        if self.trunk:
            if not Path(self._folder.name, name := f"trunk{seed}").exists():
                trunk = [f"train.steps={self.trunk}", f"train.seed={seed + 100}"]
                self._run([[*ALL, *trunk, ONE]], [name])
            words += [f"run.from.run={name}", "run.from.load=weights"]
        self._count += 1
        names = [f"run{self._count}{i}" for i in range(len(members))]
        return self._run([[*words, *member] for member in members], names)

    def _run(self, commands: list[list[str]], names: list[str]) -> float:
        """Train runs, each in a process; return the first one's held-out loss at its end."""
        started, folder = [], self._folder.name
        for words, name in zip(commands, names, strict=True):
            words = [*words, *self.words, f"run.root={folder}", f"run.name={name}"]
            command = [sys.executable, "-P", "-m", "forescale", "train", *words]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            quiet = {"stdout": subprocess.DEVNULL, "env": environment}
            started.append(subprocess.Popen(command, **quiet))
        assert [process.wait() for process in started] == [0] * len(commands)
        lines = Path(folder, names[0], "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "validation"]
        return [row["loss"] for row in rows if row["dataset"] == "validation"][-1]


if __name__ == "__main__":
    main()
