"""A run that is mirrored in a directory, for the tests of its copy and of the way back."""

import pytest

from forescale.checkpoint.mirror import mirror_of
from tests.trainer.checkpoint.mirrored import mirror_job


@pytest.fixture
def place(tmp_path):
    return tmp_path / "mirror"


@pytest.fixture
def job(own_run, place):
    return mirror_job(own_run, place)


@pytest.fixture
def lines():
    return []


@pytest.fixture
def mirror(own_run, job, lines):
    return mirror_of(own_run, job, lines.append)
