"""A node's wants with a run directory to write in."""

from dataclasses import replace

import pytest

from forescale.slurm.preflight.findings import Wanted
from tests.slurm.plain_wanted import PLAIN


@pytest.fixture
def wanted(tmp_path) -> Wanted:
    return replace(PLAIN, run=str(tmp_path))
