"""Trials whose runs appear, with simulated losses, in place of being trained."""

import numpy as np
import pytest

from forescale import cli
from forescale.resilience import pool
from forescale.trials import running
from tests.trainer.scaling.fake_training import FakeSubprocess, FakeTraining, name_of

BASE = "base=[data=bytes,train.steps=40,train.sequence_length=32,model.width=32,optimizer=adamw]"
NOISE = 0.004  # of log loss, of a run


class Simulated(FakeTraining):
    """A run whose loss is 2.5 nats, less the gain of its trial, times noise that its name seeds."""

    gains: dict[str, float] = {}  # noqa: RUF012 - a test puts its own here
    names: list[str] = []  # noqa: RUF012

    def __init__(self, argv, **options):
        name = name_of(argv)
        self.names.append(name)
        noise = np.random.default_rng([*name.encode()]).standard_normal() * NOISE
        gain = self.gains.get(name.partition("-")[0], 0.0) - 0.05 * name.startswith("base-half")
        if name not in self.codes:
            self.losses[name] = float(2.5 * np.exp(noise - gain))
        super().__init__(argv, **options)


class SimulatedSubprocess(FakeSubprocess):
    Popen = Simulated


@pytest.fixture
def tried(monkeypatch, tmp_path, capsys):
    """Returns a function that runs `forescale try` and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("started", []), ("codes", {}), ("losses", {}), ("names", [])):
        monkeypatch.setattr(Simulated, name, value)
    monkeypatch.setattr(Simulated, "gains", {})
    monkeypatch.setattr(pool, "subprocess", SimulatedSubprocess)
    monkeypatch.setattr(running, "_POLL", 0.0)

    def run(*words):
        code = cli.main(["try", *words])
        return (code, *capsys.readouterr())

    return run
