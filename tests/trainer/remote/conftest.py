"""Fixtures of servers: the small dataset of made-up text, and a server of files."""

import pytest

from tests.trainer.data.conftest import dataset, texts
from tests.trainer.remote.remote_files import serving

__all__ = ["dataset", "server", "texts"]


@pytest.fixture
def server():
    with serving() as server:
        yield server
