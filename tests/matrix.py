"""Which cases of a test run by default: FORESCALE_MATRIX=full runs all, for hours."""

import os

import pytest

FULL = os.environ.get("FORESCALE_MATRIX") == "full"
full_only = pytest.mark.skipif(not FULL, reason="one of the cases that FORESCALE_MATRIX=full adds")
