"""The small dataset and run of tests/trainer, and a command line in this process."""

from tests.trainer.conftest import forescale, small_data, trained  # noqa: F401
