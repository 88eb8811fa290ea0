"""A node's wants with a run directory to write in."""

from dataclasses import replace

import pytest
from plain_wanted import PLAIN

from slurm.findings import Wanted


@pytest.fixture
def wanted(tmp_path) -> Wanted:
    return replace(PLAIN, run=str(tmp_path))
