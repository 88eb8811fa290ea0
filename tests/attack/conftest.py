"""The small dataset of tests/trainer, and a command line in this process."""

from tests.trainer.conftest import forescale, small_data  # noqa: F401
