"""All doubts about a fit, in their order: none for good runs, and the gravest first."""

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.doubts.law import Target, doubts
from forescale.scaling.fitting import bootstrap
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.isoflop import isoflop
from forescale.scaling.fitting.laws import CHINCHILLA, FRONTIER
from forescale.scaling.fitting.points import Points
from tests.trainer.scaling.iso_flop_runs import iso_flop_table

RNG = np.random.default_rng(0)


def table():
    return iso_flop_table(np.geomspace(1e18, 1e21, 6), sizes=7, width=4.0, noise=0.003)


def sentences_of(t, target=None, form=CHINCHILLA, has_parabolas=False, refits=200):
    columns = {k: t[k].to_numpy() for k in ("loss", "parameters", "tokens", "flops") if k in t}
    points = Points(**columns)
    law = bootstrap.pairs(fit(form, points), refits)
    iso = isoflop(points, t["budget"], 0.04, count=300) if has_parabolas else None
    return doubts(t, points, law, iso, target)


def test_good_runs_and_a_target_near_them_give_no_doubt():
    t = table()
    target = Target(4e9, 1.2e11, 6 * 4.8e20)
    assert sentences_of(t, target, has_parabolas=True) == []
    assert sentences_of(t.drop(columns=["flops", "budget"]), target) == []


def test_shuffled_losses_leave_no_law_and_no_optimum():
    t = table().iloc[::2]
    sentences = sentences_of(t.assign(loss=RNG.permutation(t["loss"])), refits=10)
    assert any("of the variance of the losses of 21 runs" in f for f in sentences)


def test_terms_that_are_gone_make_the_exponent_meaningless():
    t = table().drop(columns="budget")
    t["loss"] = 3 * np.exp(0.01 * RNG.standard_normal(len(t)))
    sentences = sentences_of(t.iloc[::2], refits=10)
    (one,) = (f for f in sentences if f.startswith("The runs don't determine the law"))
    assert "then means nothing" in one


def test_an_irreducible_loss_of_nought_is_named():
    t = table()
    t["loss"] -= 1.8 + 0.005 * np.log(t["flops"] / 1e18)
    (one,) = (f for f in sentences_of(t) if f.startswith("E has no lower bound"))
    assert "anything from 0 to" in one


def test_runs_of_one_ratio_of_tokens_are_named():
    n = np.geomspace(1e7, 1e9, 5)
    loss = CHINCHILLA.predict(
        {"A": 400, "B": 2000, "E": 1.8, "alpha": 0.35, "beta": 0.37}, parameters=n, tokens=20 * n
    )
    t = pd.DataFrame({"parameters": n, "tokens": 20 * n})
    t["loss"] = loss * np.exp(0.002 * RNG.standard_normal(5))
    assert any("can't tell the effect of N from that of D" in f for f in sentences_of(t, refits=5))


@pytest.mark.parametrize(
    ("n", "ratio", "quantity"),
    [(1e12, 30, "The target's N, 1e+12,"), (2e9, 3e4, "The target's D/N, 3e+04,")],
)
def test_a_target_far_from_the_runs_is_named(n, ratio, quantity):
    (one,) = sentences_of(table(), Target(n, ratio * n, 6 * ratio * n * n))
    assert one.startswith(quantity)
    assert "above the greatest of the 42 runs" in one


def test_a_law_of_compute_alone_has_no_doubts_of_n_and_d():
    t = table().groupby("budget").min().reset_index()
    t = t.assign(parameters=0.1 * t["budget"] ** 0.5, flops=t["budget"])
    t["tokens"] = t["flops"] / 6 / t["parameters"]
    sentences = sentences_of(t, Target(np.nan, np.nan, 1e22), FRONTIER)
    assert not [f for f in sentences if "N*" in f or "target" in f]


def test_wrong_units_come_before_all_that_follows_from_them():
    t = table()
    t.loc[::2, "parameters"] /= 1e6
    t.loc[3, "budget"] = t["budget"].iloc[-1]
    sentences = sentences_of(t)
    assert sentences[0].startswith("N of 21 of 42 runs")
    assert "budgets C differs" in sentences[-1]


def test_missing_parabolas_are_a_doubt_with_their_reason():
    t = table()
    columns = {k: t[k].to_numpy() for k in ("loss", "parameters", "tokens")}
    law = bootstrap.pairs(fit(CHINCHILLA, Points(**columns)), 200)
    sentences = doubts(t, Points(**columns), law, "1 of 6 budgets have a vertex")
    assert sentences == ["The runs show no optimum of N. 1 of 6 budgets have a vertex"]
