"""The job of a small run, for all that happens before it trains."""

import pytest

from tests.trainer.small_run import make_job


@pytest.fixture
def job(small_data, tmp_path):
    """Make a job for the run `first`: job("key=value", ...)."""
    sizes = ("model.num_layers=1", "model.width=32", "model.num_heads=2", "model.mlp=relu2")
    sizes += ("precision=bf16",)  # the same on every machine

    def make(*overrides):
        return make_job(small_data, tmp_path / "runs", "first", *sizes, *overrides)

    return make
