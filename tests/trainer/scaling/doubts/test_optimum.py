"""Doubts about N* and D*: the law against the parabolas, the vertices, the order within budgets."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.doubts.law import optimum_doubts, order_doubts
from forescale.scaling.fitting import bootstrap
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.isoflop import isoflop
from forescale.scaling.fitting.laws import CHINCHILLA, allocation
from forescale.scaling.fitting.points import Points, near_best
from tests.trainer.scaling.iso_flop_runs import TRUTH, iso_flop_runs

DISTINCT = np.geomspace(1e18, 1e21, 6)


def examined(points, budgets, near=0.04, **options):
    """Return the doubts, the resampled fits and the parabolas."""
    fitted = points.take(near_best(points.loss, budgets, near))
    law = bootstrap.pairs(fit(CHINCHILLA, fitted), 200)
    iso = isoflop(points, budgets, near, count=500)
    return optimum_doubts(law, iso, **options), law, iso


def study(seed=0, **options):
    return iso_flop_runs(DISTINCT, sizes=7, width=4.0, noise=0.003, seed=seed, **options)


@pytest.mark.parametrize("seed", range(5))
def test_runs_of_a_law_give_no_doubt(seed):
    points, budgets = study(seed)
    doubts, law, _ = examined(points, budgets, flops=1e22)
    assert doubts == []
    assert order_doubts(points, budgets, law.fit) == []


def test_runs_of_a_law_with_compute_counted_otherwise_give_no_doubt():
    """C = 6 N^1.3 D, as if N left out a part of what C pays for: a of N* is 0.43, not 0.51."""
    budgets = np.repeat(DISTINCT, 7)
    n = (budgets / 1e18) ** 0.43 * 2e6 * np.tile(np.geomspace(1 / 8, 8, 7), 6)
    d = budgets / 6 / n**1.3
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(len(n)))
    loss = CHINCHILLA.predict(TRUTH, parameters=n, tokens=d) * noise
    doubts, law, iso = examined(Points(loss, parameters=n, tokens=d, flops=budgets), budgets)
    assert iso.parameters.a < float(allocation(CHINCHILLA, law.fit.values)) - 0.04
    assert doubts == []


def bent(by=0.08, power=2.0):
    """Runs whose optimum in each budget is moved off that of any law of N and D."""
    points, budgets = study()
    shift = by * np.log(budgets / 1e18) ** power
    x = np.log(points.parameters) - np.log(0.1 * budgets**0.5) - 0.3 * shift
    level = 1.8 + 20 * (budgets / 1e18) ** -0.15
    loss = level * (1 + 0.02 * x**2 + 0.0005 * np.random.default_rng(0).standard_normal(len(x)))
    return replace(points, loss=loss), budgets


def test_vertices_on_no_power_law_are_named():
    doubts = examined(*bent())[0]
    (one,) = (f for f in doubts if f.startswith("N* of the 6 vertices is no power law of C"))
    assert "its exponent goes from 0.5" in one


def test_a_law_with_another_optimum_disagrees_with_the_parabolas():
    points, budgets = study()
    _, _, iso = examined(points, budgets)
    other = TRUTH | {"A": 3e6, "alpha": 0.8}
    loss = CHINCHILLA.predict(other, parameters=points.parameters, tokens=points.tokens)
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(len(loss)))
    law = bootstrap.pairs(fit(CHINCHILLA, replace(points, loss=loss * noise)), 200)
    first, *_ = optimum_doubts(law, iso)
    assert first.startswith("The law and the parabolas disagree on the optimum beyond their 90%")
    by_law, by_parabolas = float(allocation(CHINCHILLA, law.fit.values)), iso.parameters.a
    assert f"the exponent of N* is {by_law:.3f} (" in first
    assert f"by the law and {by_parabolas:.3f} (" in first
    assert "vertices are outside the law's interval" in first


def test_losses_in_another_order_within_their_budgets_are_named():
    points, budgets = study()
    rng = np.random.default_rng(1)
    loss = pd.Series(points.loss).groupby(budgets).transform(lambda s: rng.permutation(s))
    shuffled = replace(points, loss=loss.to_numpy())
    law = fit(CHINCHILLA, shuffled)
    (one,) = order_doubts(shuffled, budgets, law)
    assert one.startswith("Within the 6 budgets, losses don't follow the law")


def test_public_tables_are_in_the_order_of_their_laws(published):
    for path in sorted((published / "backtest").glob("*.csv")):
        t = pd.read_csv(path)
        columns = {k: t[k].to_numpy() for k in ("loss", "parameters", "tokens", "flops")}
        points, budgets = Points(**columns), t["budget"].to_numpy()
        law = fit(CHINCHILLA, points.take(near_best(points.loss, budgets, 0.04)))
        assert order_doubts(points, budgets, law) == [], path


@pytest.mark.parametrize(
    ("name", "disagrees"),
    [("porian_owt2_long", True), ("porian_owt2_tuned", True), ("marin_comma", False)],
)
def test_public_laws_and_parabolas_that_disagree(published, name, disagrees):
    """The published exponents, 0.699 and 0.518, are those of the parabolas."""
    t = pd.read_csv(published / "backtest" / f"{name}.csv")
    columns = {k: t[k].to_numpy() for k in ("loss", "parameters", "tokens", "flops")}
    doubts = examined(Points(**columns), t["budget"].to_numpy())[0]
    assert bool(doubts) == disagrees
    assert not doubts or "disagree on the optimum" in doubts[0]
