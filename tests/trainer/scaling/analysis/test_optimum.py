"""N* and D* of a compute, by three ways at once."""

import numpy as np
import pandas as pd
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.analysis.optimum import optimum
from forescale.scaling.config import TargetPoint
from forescale.scaling.fitting.laws import CHINCHILLA, DATA_CONSTRAINED, compute_optimal
from forescale.scaling.report.fit_sections import answer
from tests.trainer.scaling.analysis.test_forecast import study, table
from tests.trainer.scaling.iso_flop_runs import TRUTH


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


def test_a_model_whose_tokens_repeat_is_the_best_of_all_by_brute_force():
    c, unique = 3e21, 1e10
    law = study(rows=table(noise=0))  # all ways to N* agree
    best, one = (law.predict(TargetPoint(flops=c, unique=u)) for u in (None, unique))
    assert law.predict(TargetPoint(flops=c, unique=best.tokens * 1.01)).loss == best.loss
    n = one.parameters * np.geomspace(0.2, 5, 2001)
    d = c / (law.points.per_token * n)
    v = law.fit.values
    fed = (v["alpha"] * v["A"] / v["beta"] / v["B"] * unique ** v["beta"]) ** (1 / v["alpha"])
    again = 1 + 15.387756 * (1 - np.exp(-(d / unique - 1) / 15.387756))
    excess = 1 + 5.309743 * (1 - np.exp(-(n / fed - 1) / 5.309743))
    sizes, tokens = np.where(n > fed, fed * excess, n), unique * again
    loss = v["E"] + v["A"] * sizes ** -v["alpha"] + v["B"] * tokens ** -v["beta"]
    assert one.parameters == pytest.approx(n[loss.argmin()], rel=0.003)
    assert one.parameters < best.parameters
    assert one.law == pytest.approx(loss.min(), rel=1e-5)
    facts = one.repetition
    assert facts["epochs"] == one.tokens / unique
    fresh = law.predict(TargetPoint(parameters=one.parameters, tokens=one.tokens)).loss
    assert np.exp(facts["lost"]) == pytest.approx(one.loss / fresh)
    assert facts["epochs_end"] == pytest.approx(1 + 15.387756 * np.log(10))
    there = law.predict(TargetPoint(flops=facts["flops_end"], unique=unique, far=True))
    assert there.repetition["epochs"] == pytest.approx(facts["epochs_end"], rel=0.01)


def test_repetition_moves_the_mean_of_all_ways_and_serving_too(fit):
    c, per = 3e21, fit.points.per_token
    best = fit.predict(TargetPoint(flops=c))
    one = fit.predict(TargetPoint(flops=c, unique=best.tokens / 10))
    assert 0.6 < one.parameters / best.parameters < 0.9
    assert one.optima == {}
    (low, high), _ = one.sizes
    assert np.log(high / low) == pytest.approx(np.log(np.divide(*best.sizes[0][::-1])))
    both = fit.predict(TargetPoint(flops=c, unique=best.tokens / 10, served=5e11))
    assert both.parameters < one.parameters
    assert per * both.parameters * (both.tokens + 5e11 / 3) == pytest.approx(c)


def test_runs_that_repeat_give_their_own_constant_and_are_named_without_it():
    """Runs of the source's law, along budgets, with three amounts of data."""
    values = TRUTH | {"R_D": 15.387756}
    parts = []
    for unique in (1e9, 8e9, 1e13):
        rows = table(noise=0.003).drop(columns="budget")
        at = {c: rows[c].to_numpy() for c in ("parameters", "tokens")}
        pure = DATA_CONSTRAINED.predict(values, **at, unique_tokens=unique)
        noise = rows["loss"] / CHINCHILLA.predict(TRUTH, **at)
        parts.append(rows.assign(loss=pure * noise, unique_tokens=np.minimum(unique, at["tokens"])))
    rows = pd.concat(parts, ignore_index=True)
    by_epochs = study("form=data-constrained", rows=rows)
    low, high = by_epochs.replicates.interval(0.9)[:, 5]
    assert 10 < low < by_epochs.fit.values["R_D"] < high < 25
    one = by_epochs.predict(TargetPoint(flops=3e21, unique=8e9))
    truth = compute_optimal(DATA_CONSTRAINED, values, 3e21, unique_tokens=8e9)[0][0]
    assert one.parameters == pytest.approx(truth, rel=0.1)
    assert one.sizes[0][0] < one.parameters < one.sizes[0][1]
    assert "R*_D of these runs (90%: " in str(answer(by_epochs, one).after)
    with pytest.raises(UserError, match=r"write .* form=chinchilla"):
        by_epochs.predict(TargetPoint(flops=3e21, unique=8e9, served=1e9))
    epochs = rows["tokens"] / rows["unique_tokens"]
    for form, most in (("data-constrained", epochs.max()), ("chinchilla", 1)):
        doubts = study(f"form={form}", "target.flops=3e21", "target.unique=1e6", rows=rows).doubts
        assert any(f"times, and the law knows at most {most:.2g} from" in each for each in doubts)
    doubt = study(rows=rows).doubts[0]
    assert "runs repeat their data, which the law chinchilla takes for fresh" in doubt
    assert (by_epochs.isoflop, by_epochs.is_fitted.all()) == (None, True), "budgets mix epochs"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            TargetPoint(flops=3e21, served=1e16),
            "target.flops: doesn't pay for serving 1e\\+16 tokens",
        ),
        (TargetPoint(parameters=1e9, tokens=1e11, served=1e9), "write target.flops= alone beside"),
        (TargetPoint(flops=1e22, unique=1e9, served=1e16), "doesn't pay for serving"),
        (TargetPoint(tokens=1e11, flops=1e21, most_parameters=1e9), "target.most_parameters: choo"),
    ],
)
def test_what_cannot_be_chosen_is_refused(fit, target, message):
    with pytest.raises(UserError, match=message):
        fit.predict(target)
