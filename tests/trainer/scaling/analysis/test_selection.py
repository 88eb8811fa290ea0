"""The law with the lowest backtest error near the target's extrapolation factor is chosen."""

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.analysis.selection import error_near, law_of
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.laws import CHINCHILLA, KAPLAN
from forescale.scaling.forecasting.calibrated import Backtest

CHINCHILLAS = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.28, "beta": 0.42}
KAPLANS = {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}  # as published


def table(form, values, budgets=(1e16, 1e17, 1e18, 1e19, 1e20)) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    for c in budgets:
        for n in 0.1 * c**0.5 * np.geomspace(0.4, 2.5, 5):
            d = c / 6 / n
            loss = form.predict(values, parameters=n, tokens=d)[0] * np.exp(1e-3 * rng.normal())
            rows.append({"parameters": n, "tokens": d, "flops": c, "budget": c, "loss": loss})
    return pd.DataFrame(rows)


def chosen(rows, **keys):
    return law_of(rows, StudyJob(input=["x"], form="auto", bootstraps=100, near=None, **keys), "x")


def backtest(factors, errors) -> Backtest:
    n = np.ones(len(factors), dtype=bool)
    return Backtest(3, 15, np.array(factors), np.array(errors), 0.0, n, n)


@pytest.mark.slow  # backtests of each law
def test_each_simulated_law_is_chosen_for_its_own_runs():
    target = TargetPoint(flops=1e21)
    study = chosen(table(CHINCHILLA, CHINCHILLAS), target=target)
    assert study.form is CHINCHILLA
    (note,) = (n for n in study.notes if n.startswith("The chosen law is chinchilla, by"))
    assert "kaplan" in note
    assert chosen(table(KAPLAN, KAPLANS), target=target).form is KAPLAN


def test_too_few_budgets_take_the_first_law_with_a_note():
    study = chosen(table(CHINCHILLA, CHINCHILLAS, budgets=(1e16, 1e18)))
    assert study.form is CHINCHILLA
    assert "There are no backtests to choose a law by: chinchilla is taken." in study.notes


def test_only_runs_near_the_extrapolation_factor_count():
    origins = [backtest([2, 2, 2, 10, 10, 10, 100], [0.01] * 3 + [0.02] * 3 + [0.3])]
    assert error_near(origins, 2.0) == (pytest.approx(0.01), (2, 2))
    assert error_near(origins, 10.0) == (pytest.approx(0.02), (10, 10))
    error, ends = error_near(origins, 200.0)
    assert ends == (10, 100), "too few at such factors: the half with the largest ones"
    assert error > 0.1
    assert error_near(origins, None)[1] == (2, 100)
