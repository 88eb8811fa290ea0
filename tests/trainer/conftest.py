"""A small dataset and a small run, made once; tests that change a run take a copy."""

import shutil
import time
from pathlib import Path

import pytest

from forescale import cli
from forescale.run.directory import Run
from tests.trainer.small_run import make_dataset, make_run


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="session")
def trained(small_data) -> Run:
    """A complete run named `small`; only read it."""
    return make_run(small_data, small_data.parent / "runs")


@pytest.fixture
def own_run(trained, tmp_path, monkeypatch) -> Run:
    """A copy under runs/small of the current directory, to be changed at will."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.path, "runs/small", symlinks=True)
    return Run("runs/small")


@pytest.fixture
def forescale(capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(list(map(str, words)))
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic as a test moves it: clock(seconds)."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def forward(seconds):
        now[0] += seconds

    return forward
