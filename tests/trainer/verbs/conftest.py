"""A run that fine-tunings begin with, and the command that makes one, which trains nothing."""

import pytest

from tests.questions import rows, write_rows
from tests.trainer.conftest import CommandLine
from tests.trainer.small_run import make_run

SMALL = ("model.num_layers=1", "model.width=32", "model.num_heads=2", "train.sequence_length=128")


@pytest.fixture(scope="session")
def origin(small_data, tmp_path_factory):
    """A complete run named `small`; only read it."""
    return make_run(small_data, tmp_path_factory.mktemp("origin"), "small", *SMALL)


@pytest.fixture
def lines():
    """What the file of examples holds."""
    return rows()


class Finetuning(CommandLine):
    """Makes runs that go on from `origin`, and trains nothing."""

    def __init__(self, forescale, origin, *options):
        self.forescale, self.origin, self.options = forescale, origin, options

    def __call__(self, *words, start=None):
        words = (*self.options, "prepare_only=true", *words)
        return self.forescale("finetune", start or self.origin, *words)


@pytest.fixture
def make(origin, lines, tmp_path, forescale):
    file = write_rows(tmp_path / "sums.jsonl", lines)
    options = (f"data={file}", f"run.root={tmp_path}", f"data.cache={tmp_path}")
    return Finetuning(forescale, origin.path, *options)
