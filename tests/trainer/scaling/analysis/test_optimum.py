"""N* and D* of a compute, by three ways at once."""

import numpy as np
import pytest

from forescale.scaling.analysis.optimum import optimum
from forescale.scaling.config import TargetPoint
from tests.trainer.scaling.analysis.test_forecast import study, table


@pytest.fixture(scope="module")
def fit():
    return study()


def test_n_star_is_the_geometric_mean_of_its_parts(fit):
    one = optimum(fit, 3e21, 0.9)
    assert list(one.parts) == ["law", "parabolas", "shape"]
    assert one.parameters == pytest.approx(np.prod(list(one.parts.values())) ** (1 / 3))
    assert one.parameters * one.tokens * fit.points.per_token == pytest.approx(3e21)
    best = fit.predict(TargetPoint(flops=3e21))
    assert (best.parameters, best.tokens, best.sizes) == (one.parameters, one.tokens, one.sizes)
    assert best.optima == one.parts


def test_the_interval_holds_the_parts_and_widens_with_the_distance(fit):
    def width(c):
        (low, high), _ = optimum(fit, c, 0.9).sizes
        return np.log(high / low)

    one = optimum(fit, 3e21, 0.9)
    low, high = one.sizes[0]
    assert all(low < n < high for n in one.parts.values())
    assert width(1e21) < width(3e21) < width(3e22)


def test_runs_without_budgets_have_the_optimum_of_the_law(fit):
    rows = table().drop(columns="budget")
    rows["flops"] *= np.geomspace(1, 3, len(rows))
    rows["tokens"] *= np.geomspace(1, 3, len(rows))
    law = study(rows=rows)
    one = optimum(law, 3e21, 0.9)
    assert one.parts == {"law": one.parameters}
    assert one.sizes[0][0] < one.parameters < one.sizes[0][1]
