"""The laws of precision, against what follows from their paper, and on simulated runs of them."""

import numpy as np
import pandas as pd
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.bootstrap import pairs
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.laws import (
    CHINCHILLA,
    PRECISION,
    QUANTISED,
    best_setting,
    compute_optimal,
)
from forescale.scaling.fitting.points import Points
from tests.trainer.scaling.some_laws import AFTER, BY_PARTS, PARTS, SIZED

TRUTH = SIZED | {"gamma": 4.0}
SIZES = {"parameters": 1e8, "tokens": 2e9}


def runs(form=PRECISION, values=TRUTH, seed=0, noise=0.002, n=160) -> Points:
    """Runs of the paper's sizes, tokens and bits: 30M to 220M parameters, 1.5B to 26B tokens."""
    rng = np.random.default_rng(seed)
    columns = {"parameters": rng.choice([3e7, 6e7, 1.1e8, 2.2e8], n)}
    columns["tokens"] = np.exp(rng.uniform(np.log(1.5e9), np.log(2.6e10), n))
    columns |= {c: rng.choice([3, 4, 5, 6, 8, 12, 16.0], n) for c in form.columns[2:]}
    loss = form.predict(values, **columns) * np.exp(noise * rng.standard_normal(n))
    return Points(loss, **columns)


def study(points: Points, **keys) -> StudyFit:
    columns = {c: getattr(points, c) for c in ("loss", "parameters", "tokens", *points.varied)}
    job = StudyJob(input=["x"], bootstraps=100, **{"form": "precision"} | keys)
    return StudyFit(pd.DataFrame(columns), job, "runs")


def test_the_formulas_are_those_of_the_paper():
    """Eq. 4 of three parts, eq. 5 of one P, eq. 2 of bits after training."""
    n, d = SIZES.values()
    plain = float(CHINCHILLA.predict(SIZED, **SIZES)[0])
    three = BY_PARTS.predict(SIZED | PARTS, **SIZES, weight_bits=4, activation_bits=8, cache_bits=3)
    share = np.prod([1 - np.exp(-p / g) for p, g in zip((4, 8, 3), PARTS.values(), strict=True)])
    assert three == pytest.approx(plain + 4299 * n**-0.4965 * (share**-0.4965 - 1))
    one = PRECISION.predict(TRUTH, **SIZES, bits=6)
    assert one == pytest.approx(plain + 4299 * n**-0.4965 * ((1 - np.exp(-1.5)) ** -1.4895 - 1))
    after = QUANTISED.predict(SIZED | AFTER, **SIZES, post_bits=4) - plain
    assert after == pytest.approx(0.0598 * d**0.5068 / n**0.3439 * np.exp(-4 / 0.5907))


@pytest.mark.parametrize("flops", [1e19, 1e24])
def test_the_best_precision_is_that_of_equation_5(flops):
    """3 u = e^u - 1, u = P / gamma, at any compute (section 4.3.2); at a given N it grows with
    log C (4.3.3)."""
    values = PRECISION.vector(TRUTH)[None]
    n, d, bits = best_setting(PRECISION, values, flops, 6.0, (1, 32))[0]
    assert 3 * bits / 4 == pytest.approx(np.exp(bits / 4) - 1, rel=1e-6)
    assert bits == pytest.approx(7.615, abs=1e-3)
    assert 6 * n * d * bits / 16 == pytest.approx(flops)
    held = [best_setting(PRECISION, values, c, 6.0, (1, 64), 1e8)[0, 2] for c in (1e19, 1e20, 1e21)]
    assert np.diff(held) == pytest.approx(4 * 0.4965 * np.log(10), rel=0.15)


def test_of_a_budget_no_other_precision_is_better():
    n, d, bits = best_setting(PRECISION, PRECISION.vector(TRUTH)[None], 1e21, 6.0, (1, 32))[0]
    best = PRECISION.predict(TRUTH, parameters=n, tokens=d, bits=bits)
    for other in (0.9 * bits, 1.1 * bits):
        size = compute_optimal(PRECISION, TRUTH, 1e21, bits=other)
        assert PRECISION.predict(TRUTH, parameters=size[0], tokens=size[1], bits=other) > best


@pytest.mark.parametrize(
    ("form", "values", "off"),
    [(PRECISION, TRUTH, 0.02), (BY_PARTS, SIZED | PARTS, 0.05), (QUANTISED, SIZED | AFTER, 0.1)],
    ids=["bits", "parts", "after"],
)
def test_simulated_runs_give_the_gammas_back(form, values, off):
    law = fit(form, runs(form, values))
    assert law.certificate.holds
    for symbol in form.symbols[5:]:
        if symbol != "C_T":  # it and its exponents trade off along the runs' sizes
            assert law.values[symbol] == pytest.approx(values[symbol], rel=off)


@pytest.mark.slow  # 60 fits of 200 bootstraps
def test_intervals_of_the_best_precision_and_of_the_loss_cover():
    """Nominal 90 % of 60 studies, within the error of 60 at 99 %."""
    truth = PRECISION.vector(TRUTH)[None]

    def answer(values):
        best = best_setting(PRECISION, values, 1e22, 6.0, (1, 32))
        loss = PRECISION.predict(values, parameters=1e9, tokens=1e11, bits=4)
        return np.hstack((np.log(best), np.log(loss)))

    inside = []
    for seed in range(60):
        low, high = pairs(fit(PRECISION, runs(seed=seed)), 200).interval(0.9, answer)
        inside.append((low < answer(truth)[0]) & (answer(truth)[0] < high))
    assert np.mean(inside, axis=0) == pytest.approx(0.9, abs=2.576 * np.sqrt(0.09 / 60))


def test_a_study_answers_the_best_precision_and_the_loss_at_one():
    points = runs(n=60)
    best = study(points, target=TargetPoint(flops=2e20)).predict()
    assert best.settings["bits"] == pytest.approx(7.615, rel=0.02)
    low, high = best.best["bits"]
    assert low < best.settings["bits"] < high
    assert best.sizes[0][0] < best.parameters < best.sizes[0][1]
    one = study(points, target=TargetPoint(flops=2e20, bits=4))
    four = one.predict()
    assert not four.best
    assert 6 * four.parameters * four.tokens / 4 == pytest.approx(2e20)
    assert four.loss > best.loss
    assert four.extrapolation_factor == pytest.approx(2e20 / one.points.flops.max())
    with pytest.raises(UserError, match=r"has no bits.*target.bits=, or target.flops= without"):
        study(points, target=TargetPoint(parameters=1e9, tokens=1e11)).predict()


def test_a_table_with_a_column_for_each_part_has_a_gamma_for_each():
    points = runs(BY_PARTS, SIZED | PARTS, n=60)
    three = dict(weight_bits=8, activation_bits=8, cache_bits=8)
    law = study(points, target=TargetPoint(parameters=1e9, tokens=2e10, **three))
    assert law.form.symbols[5:] == tuple(PARTS)
    truth = BY_PARTS.predict(SIZED | PARTS, parameters=1e9, tokens=2e10, **three)
    assert law.predict().loss == pytest.approx(truth[0], rel=0.005)
    with pytest.raises(UserError, match="has no weight_bits"):
        study(points, target=TargetPoint(flops=1e21)).predict()
    assert "write form=precision" in study(points, form="chinchilla").doubts[0]
    for form in ("chinchilla", "precision"):
        with pytest.raises(UserError, match=r"target.bits: the law .* doesn't read it"):
            study(points, form=form, target=TargetPoint(flops=1e21, bits=4)).predict()
