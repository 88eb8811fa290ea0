"""A small dataset of made-up text."""

from pathlib import Path

import pytest

from forescale.data.prepare.builder import build_dataset
from tests.trainer.data.synthetic_text import SMALL, Texts, synthetic


@pytest.fixture(scope="session")
def texts() -> list[bytes]:
    return synthetic()


@pytest.fixture(scope="session")
def dataset(texts, tmp_path_factory) -> Path:
    """A dataset that is built once and only read; at least 3 training shards of several members
    each."""
    return build_dataset(Texts(texts), tmp_path_factory.mktemp("data") / "tiny", SMALL)
