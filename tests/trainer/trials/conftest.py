"""Trials whose runs are simulated, in place of being trained."""

import math

import numpy as np
import pytest

from forescale import cli
from forescale.resilience import pool
from forescale.trials import running, trial
from forescale.trials.fairness import Outcome
from tests.trainer.scaling.fake_training import FakeSubprocess, FakeTraining, name_of

BASE = "base=[data=bytes,train.steps=40,train.sequence_length=32,model.width=32,optimizer=adamw]"
NOISE = 0.004  # of log loss, of a run
FACTS = {
    "data": "a", "batch": 256, "tokens": 10240, "order": "x", "flops": 1e9, "seconds": 2.0,
    "wall": 3.0, "memory": 10**8, "scored": ["validation", 7, 7, 7],
}  # fmt: skip


class Simulated(FakeTraining):
    """A run whose loss is 2.5 nats, less the gain of its trial, times noise that its name seeds.
    makes_runs: whether it has a run directory, or is an outcome alone."""

    gains: dict[str, float] = {}  # noqa: RUF012 - a test puts its own here
    names: list[str] = []  # noqa: RUF012
    makes_runs = False

    def __init__(self, argv, stdout, **options):
        name = name_of(argv)
        self.names.append(name)
        noise = np.random.default_rng([*name.encode()]).standard_normal() * NOISE
        gain = self.gains.get(name.partition("-")[0], 0.0) - 0.05 * name.startswith("base-half")
        self._code = self.codes.get(name, 0)
        if self._code:
            stdout.write(b"forescale: optimizer: is refused; choose another.\n")
            return
        self.losses[name] = float(2.5 * np.exp(noise - gain))
        if self.makes_runs:
            super().__init__(argv, stdout, **options)


class SimulatedSubprocess(FakeSubprocess):
    Popen = Simulated


def simulated_outcome(run, uniform):
    """The outcome of a simulated run."""
    loss, seed = Simulated.losses.get(run.path.name), int(run.path.name.rpartition("-s")[2])
    if loss is None:
        return Outcome("open", uniform, {})
    facts = FACTS | {"seed": seed}
    diverged = not loss < uniform
    state = "diverged" if diverged else "complete"
    return Outcome(state, min(loss, uniform if math.isfinite(uniform) else loss), facts)


@pytest.fixture
def tried_with_runs(monkeypatch, tmp_path, capsys):
    """Returns a function that runs `forescale try` and returns (exit code, stdout, stderr); each
    run has its files."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("started", []), ("codes", {}), ("losses", {}), ("names", [])):
        monkeypatch.setattr(Simulated, name, value)
    monkeypatch.setattr(Simulated, "gains", {})
    monkeypatch.setattr(Simulated, "makes_runs", True)
    monkeypatch.setattr(pool, "subprocess", SimulatedSubprocess)
    monkeypatch.setattr(running, "_POLL", 0.0)

    def run(*words):
        code = cli.main(["try", *words])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def tried(monkeypatch, tried_with_runs):
    """The same without files of runs, which take most of the time."""
    monkeypatch.setattr(Simulated, "makes_runs", False)
    monkeypatch.setattr(trial, "outcome", simulated_outcome)
    monkeypatch.setattr(trial, "unplanned", lambda run, job, seed: [])
    return tried_with_runs
