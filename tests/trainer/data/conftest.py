"""One small dataset, built once and shared by the tests of data/."""

from pathlib import Path

import pytest

from forescale.data.prepare.builder import build_dataset
from tests.trainer.data.synthetic_text import SMALL, Texts, synthetic


@pytest.fixture(scope="session")
def texts() -> list[bytes]:
    return synthetic()


@pytest.fixture(scope="session")
def dataset(texts, tmp_path_factory) -> Path:
    """Built once and only read; 3 or more training shards of several members each."""
    return build_dataset(Texts(texts), tmp_path_factory.mktemp("data") / "tiny", SMALL)
