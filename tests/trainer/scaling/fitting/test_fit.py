"""The fit finds the global minimum of each objective, and its certificate fails elsewhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.ground.errors import UserError
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.laws import CHINCHILLA, DATA_CONSTRAINED, FRONTIER, SHARED_EXPONENT
from forescale.scaling.fitting.objective import LEAST_ABSOLUTE, LEAST_SQUARES, Objective
from forescale.scaling.fitting.points import Points
from tests.trainer.scaling.some_laws import BASE, LAWS, NAMES, certify, sizes

GOALS = [Objective(), LEAST_ABSOLUTE, LEAST_SQUARES, Objective(1e-3, "loss")]


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize(("form", "values"), LAWS, ids=NAMES)
def test_a_law_is_recovered_from_losses_without_noise(form, values, goal, make):
    law = fit(form, make(form, values), goal)
    assert law.values == pytest.approx(values, rel=1e-8)
    assert law.certificate.holds
    assert law.certificate.minima[0].starts > 16
    assert not law.certificate.edges


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize(("form", "values"), LAWS, ids=NAMES)
def test_no_point_nearby_is_lower(form, values, goal, make):
    points = make(form, values, noise=0.003)
    law = fit(form, points, goal)
    assert law.certificate.holds, law.certificate.problems
    assert law.certificate.scaled_gradient <= 1e-8
    rng = np.random.default_rng(4)
    for size in (1e-2, 1e-4, 1e-6):
        theta = law.theta + size * rng.standard_normal((200, form.size))
        m, _ = form.evaluate(theta, law.task.at)
        runs = np.log(points.loss) - m if goal.on == "log" else points.loss - np.exp(m)
        assert (goal.value(runs, law.weights) >= law.value * (1 - 1e-12)).all()


def test_least_absolute_deviations_pass_through_as_many_runs_as_parameters(make):
    law = fit(CHINCHILLA, make(CHINCHILLA, BASE, noise=0.003), LEAST_ABSOLUTE)
    assert (np.abs(law.residuals) <= LEAST_ABSOLUTE.delta).sum() == 5


def test_least_absolute_deviations_of_a_line_equal_the_best_of_all_corners(make):
    """For log L = k - gamma log C the optimum passes through two of the runs."""
    rng = np.random.default_rng(5)
    C = np.exp(rng.uniform(40, 50, 15))
    loss = 30 * C**-0.05 * np.exp(0.01 * rng.standard_t(2, 15))
    law = fit(FRONTIER, Points(loss, flops=C), LEAST_ABSOLUTE)
    assert law.certificate.edges == ("E at its least",)
    x, y = np.log(C), np.log(loss)
    sums = []
    for i, j in itertools.combinations(range(15), 2):
        slope = (y[j] - y[i]) / (x[j] - x[i])
        sums.append(np.abs(y - y[i] - slope * (x - x[i])).sum())
    assert law.value / LEAST_ABSOLUTE.delta == pytest.approx(min(sums), rel=1e-6)


def test_a_certificate_fails_away_from_the_optimum(make):
    points = make(CHINCHILLA, BASE, noise=0.003)
    for goal in GOALS:
        law = fit(CHINCHILLA, points, goal)
        value, one = certify(CHINCHILLA, points, law.values, goal)
        assert one.scaled_gradient <= 1e-7  # the published parameters are rounded to doubles
        assert value == pytest.approx(law.value)
        for symbol in BASE:
            moved = law.values | {symbol: law.values[symbol] * 1.001}
            worse, no = certify(CHINCHILLA, points, moved, goal)
            assert worse > law.value
            assert not no.holds
            assert "the scaled gradient is" in no.problems[0]


@given(
    n=st.floats(-12, 12),
    d=st.floats(-12, 12),
    scale=st.floats(0.2, 5),
    delta=st.sampled_from([1e-3, np.inf]),
)
@settings(max_examples=15, deadline=None)
def test_units_change_only_the_parameters_that_have_them(n, d, scale, delta, make):
    """N and D in other units change A and B alone; the unit of the loss changes A, B and E."""
    one = make(CHINCHILLA, BASE, noise=0.003)
    N, D = one.parameters * np.exp(n), one.tokens * np.exp(d)
    two = Points(one.loss * scale, parameters=N, tokens=D)
    a, b = (fit(CHINCHILLA, p, Objective(delta)) for p in (one, two))
    assert b.value == pytest.approx(a.value, rel=1e-9)
    expected = dict(a.values)
    expected["A"] *= scale * np.exp(n * a.values["alpha"])
    expected["B"] *= scale * np.exp(d * a.values["beta"])
    expected["E"] *= scale
    assert b.values == pytest.approx(expected, rel=1e-7)


def test_a_weight_of_two_equals_a_run_listed_twice(make):
    points = make(CHINCHILLA, BASE, noise=0.003)
    w = np.random.default_rng(6).integers(0, 4, 60)
    weighted = fit(CHINCHILLA, points, weights=w)
    repeated = fit(CHINCHILLA, points.take(np.repeat(np.arange(60), w)))
    assert weighted.values == pytest.approx(repeated.values, rel=1e-8)
    assert weighted.value == pytest.approx(repeated.value)


def test_an_absent_term_is_reported_as_an_edge(make):
    runs = make(CHINCHILLA, BASE)
    loss = 400 * runs.parameters**-0.34 + 2000 * runs.tokens**-0.37
    noise = np.exp(0.003 * np.random.default_rng(7).standard_normal(60))
    law = fit(CHINCHILLA, Points(loss * noise, parameters=runs.parameters, tokens=runs.tokens))
    assert law.certificate.edges == ("E at its least",)
    assert law.certificate.holds


def test_losses_that_do_not_depend_on_the_data(make):
    runs = make(CHINCHILLA, BASE)
    noise = np.exp(0.003 * np.random.default_rng(7).standard_normal(60))
    loss = (1.8 + 400 * runs.parameters**-0.34) * noise
    points = Points(loss, parameters=runs.parameters, tokens=runs.tokens)
    law = fit(CHINCHILLA, points, LEAST_SQUARES)
    assert law.certificate.holds, law.certificate.problems
    assert law.values["alpha"] == pytest.approx(0.34, abs=0.02)


def test_runs_that_allow_two_laws_have_two_minima(make):
    """With D = 20 N for all runs the exponents can be swapped. With one exponent for both, only a
    combination of A and B is determined, and nothing is certified."""
    N = make(CHINCHILLA, BASE).parameters
    apart = {"A": 40.0, "B": 1e5, "E": 1.8, "alpha": 0.2, "beta": 0.6}
    points = make(CHINCHILLA, apart, noise=0.001, parameters=N, tokens=20 * N)
    minima = fit(CHINCHILLA, points).certificate.minima
    assert len(minima) >= 2
    assert minima[0].objective == pytest.approx(minima[1].objective, rel=1e-6)
    assert minima[0].values["alpha"] == pytest.approx(minima[1].values["beta"], rel=1e-3)
    flat = fit(SHARED_EXPONENT, points).certificate
    assert not flat.holds
    assert "no minimum, or a flat one" in flat.problems[-1]


def test_many_runs_have_the_optimum_of_starts_from_all_of_them(make, monkeypatch):
    points = make(CHINCHILLA, BASE, noise=0.01, **sizes(1500))
    for goal in GOALS[0], GOALS[2]:
        law = fit(CHINCHILLA, points, goal)
        with monkeypatch.context() as patch:
            patch.setitem(fit.__globals__, "_MANY", 10_000)
            thorough = fit(CHINCHILLA, points, goal)
        assert law.value == pytest.approx(thorough.value, rel=1e-10)
        assert law.certificate.holds
        assert sum(m.starts for m in law.certificate.minima) > 16


def test_a_law_is_no_worse_than_one_that_it_contains(make):
    """For losses of pure noise, whose optima are at the ends of the ranges."""
    for seed in (0, 1):
        points = make(CHINCHILLA, BASE, seed=seed, **sizes(30, seed))
        loss = 3 * np.exp(0.02 * np.random.default_rng(seed).standard_normal(30))
        noise = Points(loss, parameters=points.parameters, tokens=points.tokens)
        with_two = fit(CHINCHILLA, noise).value
        assert with_two <= fit(SHARED_EXPONENT, noise).value * (1 + 1e-9)


def test_too_few_different_runs_are_refused(make):
    points = make(CHINCHILLA, BASE)
    with pytest.raises(UserError, match="4 different runs don't determine the 5 parameters"):
        fit(CHINCHILLA, points.take([0, 1, 2, 3, 3, 3]))
    with pytest.raises(UserError, match="4 different runs"):
        fit(CHINCHILLA, points, weights=np.arange(60) < 4)
    same = make(CHINCHILLA, BASE, parameters=np.full(60, 1e9))
    with pytest.raises(UserError, match="all runs have the same parameters"):
        fit(CHINCHILLA, same)
    new = make(DATA_CONSTRAINED, BASE | {"R_D": 9.0}, unique_tokens=np.full(60, 1e13))
    with pytest.raises(UserError, match="no run repeats its data"):
        fit(DATA_CONSTRAINED, new)
    runs = {"parameters": points.parameters, "tokens": points.tokens}
    with pytest.raises(UserError, match="all runs have the same loss"):
        fit(CHINCHILLA, Points(np.full(60, 3.0), **runs))
    with pytest.raises(UserError, match="not one finite number per run"):
        fit(CHINCHILLA, points, weights=[1.0])
    with pytest.raises(UserError, match="no objective"):
        Objective(-1.0)
