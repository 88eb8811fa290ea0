"""The objectives of a table's fit."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.objective import LEAST_SQUARES
from forescale.scaling.fitting.points import Points

LAW = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}


def table() -> pd.DataFrame:
    """Runs of a law on five budgets, with a noise of 0.3 %."""
    rng = np.random.default_rng(3)
    c = np.repeat(np.geomspace(1e17, 1e21, 5), 4)
    n = 0.1 * c**0.5 * np.tile(np.geomspace(0.4, 2.5, 4), 5)
    loss = CHINCHILLA.predict(LAW, parameters=n, tokens=c / 6 / n)
    loss *= np.exp(0.003 * rng.standard_normal(len(c)))
    return pd.DataFrame({"parameters": n, "tokens": c / 6 / n, "flops": c, "loss": loss})


def points(rows: pd.DataFrame) -> Points:
    return Points(rows["loss"], rows["parameters"], rows["tokens"], rows["flops"])


def study(rows: pd.DataFrame, **keys) -> StudyFit:
    keys = {"bootstraps": 100, "near": None, "method": "law"} | keys
    return StudyFit(rows, StudyJob(input=["x"], target=TargetPoint(flops=1e22), **keys), "x")


def test_delta_of_none_is_least_squares():
    rows = table()
    noise = study(rows, delta=None)
    assert noise.fit.values == fit(CHINCHILLA, points(rows), LEAST_SQUARES).values
    assert "least squares" in noise.fit.certificate.method


def test_residuals_of_the_loss_itself_are_those_of_a_least_squares_fit_elsewhere():
    """scipy's curve_fit, begun at the truth, is the oracle."""
    rows = table()
    law = study(rows, delta=None, residual="loss")

    def loss(x, a, b, e, alpha, beta):
        return e + np.exp(a) * x[0] ** -alpha + np.exp(b) * x[1] ** -beta

    n, d = rows.parameters.to_numpy(), rows.tokens.to_numpy()
    start = [np.log(LAW["A"]), np.log(LAW["B"]), LAW["E"], LAW["alpha"], LAW["beta"]]
    best, _ = optimize.curve_fit(loss, (n, d), rows.loss.to_numpy(), start, maxfev=100_000)
    squares = np.square(rows.loss - loss((n, d), *best)).sum()
    assert law.fit.certificate.holds
    assert 2 * law.fit.value <= squares * (1 + 1e-6)
    assert law.fit.values["E"] == pytest.approx(best[2], rel=1e-3)
    assert law.fit.value != pytest.approx(study(rows, delta=None).fit.value, rel=1e-3)
