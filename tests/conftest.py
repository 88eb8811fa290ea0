"""Fixtures for all: a small real dataset, of this project's own source."""

import gc
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from tests.matrix import FULL

# Nothing that is imported and collected is garbage; a collector that looks through it again and
# again takes a fifth of the time. It begins when all is collected.
gc.disable()

# A shell that starts us in the background has this signal ignored, and so would all that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest-xdist sets it in its workers: pages would be as wide as the terminal that tests run in.
os.environ.pop("COLUMNS", None)

# A worker for each core: more threads would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes is the machine's affair.
# The fast tests are to take four minutes; FORESCALE_MATRIX=full draws as many as hypothesis would.
settings.register_profile("ours", deadline=None, max_examples=100 if FULL else 60)
settings.load_profile("ours")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the longest tests first: one that began last would run alone for minutes.

    A test that may take long has a timeout mark that says so.
    """
    limits: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        limits[item.path] = max(limits.get(item.path, 0), mark.args[0] if mark else 0)
    items.sort(key=lambda item: -limits[item.path])  # stable: the rest stays in its order


def pytest_collection_finish() -> None:
    """Look for no garbage in what is imported and collected: it took a tenth of the time."""
    gc.freeze()
    gc.enable()


def built(source: Path, output: Path) -> Path:
    """Build a dataset of Python source: a BPE of 512 entries, two splits.

    Each run evaluates the held-out one whole at its end: it is 2 % of the text, a tenth of a small
    run's time. So that it is never a few words, short files are left out.
    """
    from forescale.data.prepare.builder import BuildConfig, build_dataset
    from forescale.data.text.files import Files

    config = BuildConfig(vocab_size=512, validation=0.02, shard_tokens=30_000, member_tokens=10_000)
    files = sorted(path for path in source.rglob("*.py") if path.stat().st_size > 4000)
    return build_dataset(Files(files), output, config)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Some 170,000 tokens of Python."""
    source = Path(__file__).parents[1] / "trainer/data"
    return built(source, tmp_path_factory.mktemp("data") / "source")


@pytest.fixture(scope="session")
def large_dataset(tmp_path_factory) -> Path:
    """Some 900,000 tokens of Python, for runs that are to read none twice."""
    return built(Path(__file__).parents[1] / "trainer", tmp_path_factory.mktemp("data") / "large")
