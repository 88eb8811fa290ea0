"""Weights by the noise of repeats and by distance to the target, also in resampled fits."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from forescale.ground.errors import UserError
from forescale.scaling.analysis.table_fit import StudyFit, as_dict
from forescale.scaling.analysis.weights import NOISE, effective, noise_of_repeats, weigh
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.bootstrap import counts, pairs
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.objective import LEAST_ABSOLUTE, LEAST_SQUARES, Objective
from forescale.scaling.fitting.points import Points
from tests.trainer.scaling.some_laws import certify

LAW = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}


def table(noise, seeds=1, bend=0.0, count=4) -> pd.DataFrame:
    """Runs of a law on five budgets, each with `seeds` seeds. noise: of log loss, by C; bend: a
    deviation from the law that grows with the distance from the largest budget."""
    rng, rows = np.random.default_rng(3), []
    for c in np.geomspace(1e17, 1e21, 5):
        for n in 0.1 * c**0.5 * np.geomspace(0.4, 2.5, count):
            loss = float(CHINCHILLA.predict(LAW, parameters=n, tokens=c / 6 / n)[0])
            loss *= np.exp(bend * (21 - np.log10(c)) ** 2)
            for seed in range(seeds):
                rows.append({"parameters": n, "tokens": c / 6 / n, "flops": c, "seed": seed,
                             "loss": loss * np.exp(noise(c) * rng.standard_normal())})  # fmt: skip
    return pd.DataFrame(rows)


def points(rows: pd.DataFrame) -> Points:
    return Points(rows["loss"], rows["parameters"], rows["tokens"], rows["flops"])


def test_noise_is_estimated_from_repeats_as_a_power_of_compute():
    rows = table(lambda c: 0.01 * (c / 1e19) ** -0.1, seeds=8)
    noise = noise_of_repeats(rows, points(rows))
    assert noise.freedom == 5 * 4 * 7
    assert noise.slope == pytest.approx(-0.1, abs=0.03)
    assert noise(np.array([1e17, 1e21])) == pytest.approx([0.0158, 0.0063], rel=0.3)


def test_few_repeats_change_the_prior_noise_little():
    rows = table(lambda c: 0.02)
    twice = pd.concat([rows, rows.head(1).assign(seed=9, loss=rows["loss"][0] * 1.05)])
    noise = noise_of_repeats(twice, points(twice))
    assert noise.freedom == 1
    assert NOISE < noise.at < 0.02


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.drop(columns="seed"),  # runs may differ in something without a column
        lambda rows: rows.assign(seed=0),  # the same run, listed twice
        lambda rows: rows.assign(learning_rate=np.arange(len(rows))),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_no_repeats(change):
    rows = change(table(lambda c: 0.02, seeds=3))
    assert noise_of_repeats(rows, points(rows)).freedom == 0


def test_weight_falls_with_the_distance_in_decades():
    flops = np.array([1e18, 1e19, 1e20, 1e22])
    w = weigh(flops, None, 1e21)
    assert w.mean() == pytest.approx(1)
    assert w[0] / w[1] == pytest.approx((0.04**2 + NOISE**2) / (0.06**2 + NOISE**2))
    assert w[2] == pytest.approx(w[3]), "the same above the target as below it"
    assert effective(np.ones(7)) == pytest.approx(7)
    assert effective(w) < 3


@pytest.mark.parametrize("goal", [Objective(), LEAST_ABSOLUTE, LEAST_SQUARES], ids=str)
def test_weighted_fits_and_their_replicates_are_certified(goal):
    study = points(table(lambda c: 0.004))
    w = weigh(study.flops, None, 1e22)
    noise = fit(CHINCHILLA, study, goal, w)
    assert noise.certificate.holds, noise.certificate.problems
    plain, _ = certify(CHINCHILLA, study, fit(CHINCHILLA, study, goal).values, goal, w)
    assert noise.value < plain
    assert pairs(noise, 60 if goal.delta else 10).uncertified == 0


def test_resampling_multiplies_the_weights():
    """A replicate is the fit with the product of the weights and the draws."""
    study = points(table(lambda c: 0.004))
    w = weigh(study.flops, None, 1e22)
    drawn = counts(np.random.default_rng(0), len(study), 1)[0]
    one = pairs(fit(CHINCHILLA, study, weights=w), 1, 0)
    assert one.values[0] == pytest.approx(
        fit(CHINCHILLA, study, weights=w * drawn).vector, rel=1e-5
    )


def study(rows: pd.DataFrame, **keys) -> StudyFit:
    target = keys.pop("target", TargetPoint(flops=1e22))
    return StudyFit(
        rows,
        StudyJob(
            input=["x"], target=target, **{"bootstraps": 100, "near": None, "method": "law"} | keys
        ),
        "x",
    )


def test_distance_weights_halve_the_error_of_a_law_that_does_not_hold():
    rows = table(lambda c: 0.0, bend=0.003)
    truth = {w: study(rows, weights=w).predict() for w in ("none", "distance")}
    errors = {
        w: abs(
            np.log(f.loss / CHINCHILLA.predict(LAW, parameters=f.parameters, tokens=f.tokens)[0])
        )
        for w, f in truth.items()
    }
    assert errors["distance"] < errors["none"] / 2


def test_the_results_contain_weights_and_noise():
    rows = table(lambda c: 0.003, seeds=2)
    plain, both = study(rows), study(rows, weights="both")
    assert plain.weights is None
    assert as_dict(both)["weights"] == pytest.approx(both.weights.tolist())
    assert as_dict(both)["noise"]["freedom"] == 20
    assert not [n for n in both.notes if "No two runs" in n]
    alone = study(rows.drop(columns="seed"), weights="noise")
    assert alone.weights == pytest.approx(np.ones(len(rows)))
    assert any("a noise of 0.3% is assumed for all runs." in note for note in alone.notes)
    json.dumps(as_dict(both))


def test_distance_weights_need_the_compute_of_a_target():
    for target in (TargetPoint(), TargetPoint(parameters=1e9)):
        with pytest.raises(UserError, match="distance needs the target's compute"):
            study(table(lambda c: 0.003), weights="distance", target=target)


def test_delta_of_none_is_least_squares():
    rows = table(lambda c: 0.003)
    noise = study(rows, delta=None)
    assert noise.fit.values == fit(CHINCHILLA, points(rows), LEAST_SQUARES).values
    assert "least squares" in noise.fit.certificate.method


def test_residuals_of_the_loss_itself_are_those_of_a_least_squares_fit_elsewhere():
    """scipy's curve_fit, begun at the truth, is the oracle."""
    rows = table(lambda c: 0.003)
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
