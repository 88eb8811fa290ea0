"""Fixtures: the public scaling data, synthetic runs of a law, and simulated study cells."""

import os
from pathlib import Path

import numpy as np
import pytest

from forescale.resilience import pool
from forescale.scaling.fitting.points import Points
from forescale.scaling.study import launching
from tests.trainer.scaling.fake_training import FakeSubprocess, FakeTraining

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of the public data: $FORESCALE_DATA/scaling, or beside the checkout."""
    folder = Path(os.environ.get("FORESCALE_DATA", ROOT.parent / "shared" / "data")) / "scaling"
    if not folder.is_dir():
        pytest.skip(f"the public scaling data is not at {folder}; set FORESCALE_DATA")
    return folder


@pytest.fixture(scope="session")
def columns() -> dict[str, np.ndarray]:
    """60 runs over three decades of N and D, most with repeated data."""
    rng = np.random.default_rng(0)
    N, D = np.exp(rng.uniform(np.log([[1e7], [1e9]]), np.log([[1e10], [1e12]]), (2, 60)))
    U = D / np.exp(rng.uniform(-0.5, np.log(40), 60))
    X = 2.0 ** (np.arange(60) % 6)
    bits = rng.permuted(np.tile([[3.0, 4.0, 5.0, 6.0, 8.0, 16.0]], (5, 10)), axis=1)
    names = ("bits", "weight_bits", "activation_bits", "cache_bits", "post_bits")
    plain = {"parameters": N, "tokens": D, "unique_tokens": U, "expansion": X, "flops": 6 * N * D}
    words = N ** rng.uniform(0.6, 0.9, 60)
    return plain | dict(zip(names, bits, strict=True)) | {"vocabulary": words}


@pytest.fixture(scope="session")
def make(columns):
    """Returns a function that makes points of a law, with noise of log loss."""

    def points(form, values, noise=0.0, seed=1, **changed) -> Points:
        columns_of = {k: v for k, v in (columns | changed).items() if k in form.columns}
        loss = form.predict(values, **columns_of)
        rng = np.random.default_rng(seed)
        return Points(loss * np.exp(noise * rng.standard_normal(len(loss))), **columns_of)

    return points


@pytest.fixture(scope="module")
def fake_training():
    """FakeTraining, which replaces the training of cells in a test module."""
    patch = pytest.MonkeyPatch()
    for name, value in (("started", []), ("devices", []), ("codes", {}), ("losses", {})):
        patch.setattr(FakeTraining, name, value)

    patch.setattr(pool, "subprocess", FakeSubprocess)
    patch.setattr(launching, "_POLL", 0.0)
    yield FakeTraining
    patch.undo()
