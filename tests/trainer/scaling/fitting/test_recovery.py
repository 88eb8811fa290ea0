"""The coverage of nominal intervals over simulated studies of a known law.

The design and the table of all intervals are in tests/benchmarks/bench_recovery.py.
FORESCALE_REPLICATES=1000 sets the replicates of each study; the default is 200.
"""

import os

import pytest

from forescale.scaling.fitting import newton
from forescale.scaling.fitting.objective import LEAST_SQUARES, Objective
from tests.benchmarks.bench_recovery import NAMES, coverage
from tests.matrix import full_only

REPLICATES = int(os.environ.get("FORESCALE_REPLICATES", "200"))


@pytest.mark.slow  # 200 simulated studies, each with 200 bootstraps
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("noise", "goal"),
    [pytest.param(2e-3, Objective(), marks=full_only), (5e-3, Objective()), (2e-3, LEAST_SQUARES)],
)
def test_nominal_90_percent_covers_84_to_96(noise, goal, monkeypatch):
    """Coverage of each parameter and each quantity in NAMES, over 200 studies. With noise below
    Huber's delta the Huber objective is least squares."""
    monkeypatch.setattr(newton, "_CHUNK", 256)  # a quarter faster here, equal up to rounding
    covered = coverage(noise, goal, REPLICATES, studies=200)
    law = covered["corrected"]
    assert dict(zip(NAMES, law, strict=True)) == pytest.approx(dict.fromkeys(NAMES, 0.9), abs=0.06)
