"""A run for the tests of what is shown of it."""

import pytest

from forescale.run.directory import Parent, Run
from tests.trainer.small_run import train_row


@pytest.fixture
def unfinished(own_run) -> Run:
    """Resumed at step 4 of 8, with rows up to step 6."""
    attempt = own_run.new_attempt()
    attempt.start_from(Parent(4, str(own_run.checkpoint_path(4))), own_run)
    for step in (5, 6):
        attempt.metrics.add(train_row(attempt, step))
    return own_run
