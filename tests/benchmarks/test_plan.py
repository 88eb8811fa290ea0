"""The plan's speeds beside 15 published ones, and its parameters and memory of the same jobs."""

import pytest

from tests.benchmarks.bench_plan import MEASURED, SHAPES, planned, predicted

FARTHEST = [row for row in MEASURED if (row.model, row.gpus) in {("13b", 8), ("30b", 32)}]
OTHERS = [row for row in MEASURED if row not in FARTHEST]
SLOW = pytest.mark.slow  # a second for three rows; those that are farthest off run always


@pytest.mark.parametrize("row", [*FARTHEST, *(pytest.param(row, marks=SLOW) for row in OTHERS)])
def test_a_published_speed_is_predicted_and_its_job_fits(row):
    plan = planned(row)
    assert plan.parameters["total"] == SHAPES[row.model][3]
    assert plan.problems == []  # it was trained, so it fits
    assert 0.765 < predicted(plan, row) / row.speed < 1.18
