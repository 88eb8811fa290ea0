"""A node's wants with a run directory to write in."""

from dataclasses import replace

import pytest

from forescale.slurm.preflight.findings import Requirements
from tests.slurm.plain_requirements import PLAIN


@pytest.fixture
def requirements(tmp_path) -> Requirements:
    return replace(PLAIN, run=str(tmp_path))
