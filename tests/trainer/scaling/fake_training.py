"""A fake training for tests of studies.

In place of the process that trains a cell, its complete run directory appears, with the loss of a
simulated law. The composed arguments, the files and the rows are real; there are no weights.

The simulated loss: Chinchilla's law, times a parabola in the learning rate around `best_rate`, and
noise that depends on the seeds.
"""

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np

from forescale.checkpoint.reader import FORMAT
from forescale.config.compose import compose
from forescale.config.target import CELL, STORED
from forescale.config.train import TrainJob
from forescale.ground.storage import write_json, write_table
from forescale.models.flops import flops_per_token
from forescale.run.directory import Parent
from forescale.run.start import start
from forescale.scaling.records.records import record
from forescale.scaling.study.directory import Study
from tests.trainer.small_run import change_rows
from tests.warm import Launcher

LAW = {"A": 3.0, "B": 60.0, "E": 0.9, "alpha": 0.2, "beta": 0.3}


def best_rate(n: float) -> float:
    return 0.05 * (n / 2e4) ** -0.4


class FakeTraining:
    """Replaces subprocess.Popen. started: the arguments of all started cells; devices: the GPUs
    that each may use; codes: by name, the exit code of a cell that makes no run; losses: by name,
    in place of the simulated loss."""

    started: ClassVar[list[list[str]]] = []
    devices: ClassVar[list[str | None]] = []
    codes: ClassVar[dict[str, int]] = {}
    losses: ClassVar[dict[str, float]] = {}
    pid = 1

    def __init__(self, argv, stdout, env, **options):
        arguments = argv[argv.index("train") + 1 :]
        self.started.append(arguments)
        self.devices.append(env.get("CUDA_VISIBLE_DEVICES"))
        name = name_of(arguments)
        self._code = self.codes.get(name, 0)
        if self._code:
            stdout.write(b"forescale: optimizer: is refused; choose another.\n")
        else:
            train(arguments, self.losses.get(name))

    def poll(self):
        return self._code

    def send_signal(self, number):
        pass


class FakeSubprocess:
    """The parts of `subprocess` that start a cell."""

    Popen, DEVNULL, STDOUT = FakeTraining, subprocess.DEVNULL, subprocess.STDOUT


class MostlyFake(FakeTraining):
    """Trains the cells in `real`, and makes the runs of all others."""

    real: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, argv, **keys):
        if name_of(argv) in cls.real:
            words = argv[argv.index("forescale") + 1 :]
            return Launcher(words, Path.cwd(), keys["env"], keys["stdout"].fileno())
        return super().__new__(cls)


def kill_launcher_during(cell: str, study: Study, *words: str) -> None:
    """Launch a study in a process of its own, and kill that once the cell has a checkpoint."""
    command = [sys.executable, "-P", "-m", "forescale", "study", "launch", *words]
    launcher, run = subprocess.Popen(command), study.run(cell)
    while not (run.config.is_file() and run.checkpoint_steps()):
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()


def name_of(argv) -> str:
    return next(w.partition("=")[2] for w in argv if w.startswith("run.name="))


def train(arguments, loss=None) -> None:
    """Make a complete run with these arguments of `train`."""
    begun = start(compose(TrainJob, [a for a in arguments if a not in (CELL, STORED)]))
    job, run = begun.job, begun.run
    attempt, step = run.new_attempt(), job.total_steps
    tokens = step * job.tokens_per_step
    attempt.start_from(Parent(0), run)
    common = {"step": step, "attempt": attempt.number, "tokens": tokens}
    seconds = {"compute": 2.0, "data": 0.1}
    first, *rest = job.data.sources or ("",)
    shares = {"shares": {first: tokens, **dict.fromkeys(rest, 0)}} if rest else {}
    each = flops_per_token(job.model, job.train.sequence_length, causal=True)
    cost = {"flops_causal": tokens * each, "memory_bytes": 10**8, "tokens_per_second": 1000.0}
    row = {"kind": "train", **common, **cost, "loss": 3.0, "seconds": seconds, **shares}
    attempt.metrics.add(row)
    score = {"dataset": "validation", "loss_stderr": 0.01, "bits_per_byte": 2.0, "windows": 7}
    attempt.metrics.add({"kind": "validation", **common, "loss": 3.0, **score})
    path = run.checkpoint_path(step)
    path.mkdir(parents=True)
    position = {"step": step, "g": 0, "tokens": tokens}
    state = {"format": FORMAT, "position": position, "attempt": attempt.number, "world_size": 1}
    empty = {"numerics": {"stage": 1}, "counters": {}, "shapes": {}, "fragments": []}
    write_table(path, {"state.json": write_json(path / "state.json", state | empty)})
    loss = simulated_loss(record(run)) if loss is None else loss
    of_sources = source_losses(record(run))

    def scored(rows):
        added = [rows[-1] | {"dataset": name, "loss": x} for name, x in of_sources.items()]
        return [row | {"loss": loss} for row in rows] + added

    change_rows(attempt.metrics.path, scored)


def source_losses(row) -> dict[str, float]:
    """The losses of single sources; none, unless a test puts its own function here."""
    return {}


def simulated_loss(row) -> float:
    n, d = row["parameters_blocks_and_head"], row["tokens"]
    law = LAW["E"] + LAW["A"] * n ** -LAW["alpha"] + LAW["B"] * d ** -LAW["beta"]
    off = math.log(row["learning_rate"] / best_rate(n))
    seeds = [row["seed"], row["init_seed"], n]
    noise = np.random.default_rng(seeds).standard_normal()
    return law * math.exp(0.01 * off**2 + 1e-3 * noise)
