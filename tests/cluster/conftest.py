"""One SLURM cluster for all tests of this folder, as new for each of them."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import Lab, missing
from tests.cluster.submitted import REPORTS

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if not item.get_closest_marker("timeout"):  # each wait has a limit of its own
                item.add_marker(pytest.mark.timeout(900))


def pytest_terminal_summary(terminalreporter):
    if REPORTS:
        terminalreporter.section("faults")
        head = ["| fault | noticed after | trains again after | steps lost |", "|---|---|---|---|"]
        terminalreporter.write_line("\n".join([*head, *REPORTS]))


@pytest.fixture(scope="session")
def can_start() -> None:
    """Skips where no cluster can be started; fails where FORESCALE_NEEDS_CLUSTER=1 says that one
    must be."""
    if reason := missing():
        if os.environ.get("FORESCALE_NEEDS_CLUSTER") == "1":
            pytest.fail(f"FORESCALE_NEEDS_CLUSTER is set, but {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def lab(can_start, request) -> Iterator[Lab]:
    """Four nodes of 4 cores and 6 GB. Its logs stay where a test failed."""
    root = Path(tempfile.mkdtemp(prefix="fs", dir="/tmp"))  # short: it holds unix sockets
    lab = Lab(root)
    atexit.register(lab.stop)
    lab.start()
    yield lab
    lab.stop()
    if not request.session.testsfailed:
        shutil.rmtree(root)


@pytest.fixture(autouse=True)
def _as_new(request) -> Iterator[None]:
    """Whatever a test did to the cluster, the next one finds it as new."""
    lab = request.getfixturevalue("lab") if "lab" in request.fixturenames else None
    yield
    if lab:
        lab.reset()
