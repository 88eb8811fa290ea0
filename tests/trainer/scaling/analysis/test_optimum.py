"""N* and D* of a compute, by three ways at once."""

import numpy as np
import pytest

from forescale.ground.errors import UserError
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


def test_a_model_that_serves_is_smaller_and_its_compute_pays_for_both(fit):
    c, served, per = 3e21, 5e11, fit.points.per_token
    best, one = fit.predict(TargetPoint(flops=c)), fit.predict(TargetPoint(flops=c, served=served))
    assert one.parameters < best.parameters
    spent = per * one.parameters * (one.tokens + served / 3)
    assert spent == pytest.approx(c)
    assert one.optima == {}, "it is no mean of the ways to N*"
    assert one.flops == pytest.approx(per * one.parameters * one.tokens)
    ratio = one.parameters / best.parameters
    n = optimum(fit, c, 0.9).parts["law"] * ratio * np.array([0.8, 1, 1.25])
    loss = fit.fit.predict(parameters=n, tokens=c / (per * n) - served / 3)
    assert loss.argmin() == 1, "a smaller or larger model would lose, by the law"


def test_a_largest_model_bounds_the_best_one(fit):
    best = fit.predict(TargetPoint(flops=3e21))
    one = fit.predict(TargetPoint(flops=3e21, most_parameters=best.parameters / 3))
    assert one.parameters == best.parameters / 3 == one.sizes[0][1]
    assert one.tokens == pytest.approx(3 * best.tokens)
    assert one.loss > best.loss
    same = fit.predict(TargetPoint(flops=3e21, most_parameters=best.parameters * 3))
    assert (same.parameters, same.loss) == (best.parameters, best.loss)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            TargetPoint(flops=3e21, served=1e16),
            "target.flops: doesn't pay for serving 1e\\+16 tokens",
        ),
        (TargetPoint(parameters=1e9, tokens=1e11, served=1e9), "write target.flops= alone beside"),
        (TargetPoint(tokens=1e11, flops=1e21, most_parameters=1e9), "target.most_parameters: choo"),
    ],
)
def test_what_cannot_be_chosen_is_refused(fit, target, message):
    with pytest.raises(UserError, match=message):
        fit.predict(target)
