"""Each law: formula, derivatives, internal and published parameters, optimum."""

import numpy as np
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.fitting.forms import Form, design
from forescale.scaling.fitting.laws import (
    CHINCHILLA,
    DATA_CONSTRAINED,
    FRONTIER,
    KAPLAN,
    OVER_TRAINING,
    SHARED_EXPONENT,
    allocation,
    compute_optimal,
    repeated,
)
from forescale.scaling.fitting.objective import LEAST_SQUARES, Objective, curvatures, local
from tests.trainer.scaling.some_laws import BASE, LAWS, NAMES

each = pytest.mark.parametrize(("form", "values"), LAWS, ids=NAMES)


def near(form, values, at, count=5):
    theta = form.internal(form.vector(values)[None], at.centre)
    return theta + 0.05 * np.random.default_rng(2).standard_normal((count, form.size))


@each
def test_first_derivatives_equal_those_of_a_complex_step(form, values, make):
    at = design(form, make(form, values))
    theta = near(form, values, at)
    _, jacobian = form.evaluate(theta, at)
    for j in range(form.size):
        aside = theta.astype(complex)
        aside[:, j] += 1e-30j
        np.testing.assert_allclose(
            jacobian[:, j], form.evaluate(aside, at)[0].imag / 1e-30, rtol=1e-9, atol=1e-13
        )


@each
def test_second_derivatives_equal_differences_of_the_first(form, values, make):
    at = design(form, make(form, values))
    theta = near(form, values, at)
    pull = np.random.default_rng(3).standard_normal((len(theta), 60))
    _, jacobian = form.evaluate(theta, at)
    computed = form.curvature(theta, at, jacobian, pull)
    of_log = computed - np.einsum("rpn,rqn,rn->rpq", jacobian, jacobian, pull)
    for j in range(form.size):
        step = np.zeros(form.size)
        step[j] = 1e-6
        up, down = (form.evaluate(theta + s, at)[1] for s in (step, -step))
        slope = np.einsum("rpn,rn->rp", (up - down) / 2e-6, pull)
        np.testing.assert_allclose(of_log[:, :, j], slope, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(computed, Form.curvature(form, theta, at, jacobian, pull), atol=1e-9)


@pytest.mark.parametrize("goal", [Objective(0.05), LEAST_SQUARES, Objective(0.2, "loss")], ids=str)
def test_gradient_and_hessian_of_the_objective_equal_differences(goal, make):
    points = make(CHINCHILLA, BASE, noise=0.03)
    at, y, w = design(CHINCHILLA, points), np.log(points.loss)[None], np.full((1, 60), 1.5)
    theta = near(CHINCHILLA, BASE, at, 1)
    here = local(CHINCHILLA, at, y, w, theta, goal)
    hessian, _ = curvatures(CHINCHILLA, at, w, theta, goal, here)
    assert here.value == pytest.approx(goal.value(here.residual, w))
    for j in range(5):
        step = np.zeros(5)
        step[j] = 1e-6
        up, down = (local(CHINCHILLA, at, y, w, theta + s, goal) for s in (step, -step))
        assert here.gradient[0, j] == pytest.approx((up.value - down.value)[0] / 2e-6, rel=1e-5)
        slope = (up.gradient - down.gradient)[0] / 2e-6
        np.testing.assert_allclose(hessian[0, :, j], slope, rtol=1e-4, atol=1e-4)


@each
def test_published_and_internal_are_one_to_one(form, values, make):
    at = design(form, make(form, values))
    theta = near(form, values, at)
    there = form.published(theta, at.centre)
    np.testing.assert_allclose(form.internal(there, at.centre), theta, rtol=1e-12, atol=1e-12)


def test_the_formulas_are_those_of_the_papers():
    N, D = 1.3e9, 7.0e10
    assert CHINCHILLA.predict(BASE, parameters=N, tokens=D) == pytest.approx(
        1.8 + 400 * N**-0.34 + 2000 * D**-0.37
    )
    kaplan = {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}
    assert KAPLAN.predict(kaplan, parameters=N, tokens=D) == pytest.approx(
        ((8.8e13 / N) ** (0.076 / 0.095) + 5.4e13 / D) ** 0.095
    )
    M, C = D / N, 6 * N * D
    gadre = {"a": 212.0, "b": 366.0, "E": 1.84, "eta": 0.136}
    assert OVER_TRAINING.predict(gadre, parameters=N, tokens=D) == pytest.approx(
        1.84 + (212 * M**0.136 + 366 * M**-0.136) * C**-0.136
    )
    assert FRONTIER.predict({"K": 9.0, "E": 1.7, "gamma": 0.1}, flops=C) == pytest.approx(
        1.7 + 9 * C**-0.1
    )
    few = dict(parameters=1e9, tokens=np.array([1e10, 2e10]))  # none is repeated
    computed = DATA_CONSTRAINED.predict(BASE | {"R_D": 3.0}, unique_tokens=2e10, **few)
    np.testing.assert_allclose(computed, CHINCHILLA.predict(BASE, **few))


# The authors' own: README of huggingface/datablations, "Parametric Fit".
C4 = {"A": np.exp(6.255414), "B": np.exp(7.3049974), "E": np.exp(0.6254804)} | {
    "alpha": 0.3526596, "beta": 0.3526596, "R_D": 15.387756,
}  # fmt: skip


def test_repeated_tokens_and_excess_parameters_are_worth_what_the_authors_print():
    runs = dict(parameters=[6.34e9, 8.67e9], tokens=[242e9, 178e9], unique_tokens=25e9)
    losses = DATA_CONSTRAINED.predict(C4, **runs)
    np.testing.assert_allclose(losses, [2.2256440889984477, 2.2269634075087867], rtol=1e-12)
    budget = 6 * 8.67e9 * 178e9
    (n,), (d,) = compute_optimal(DATA_CONSTRAINED, C4, budget, unique_tokens=25e9)
    assert f"{d / 1e9:.0f}B tokens, {d / 25e9:.1f} epochs, {n / 1e9:.1f}B parameters" == (
        "227B tokens, 9.1 epochs, 6.8B parameters"
    )


def test_of_a_law_without_repetition_the_published_constant_is_taken():
    chinchilla = [C4[s] for s in CHINCHILLA.symbols]
    assert repeated(CHINCHILLA, chinchilla).tolist() == list(C4.values())
    assert repeated(SHARED_EXPONENT, chinchilla[:4]).tolist() == list(C4.values())
    assert repeated(DATA_CONSTRAINED, [1, 2, 3, 4, 5, 6]).tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match="kaplan doesn't say what repeated tokens are worth"):
        repeated(KAPLAN, [1, 2, 3, 4])


@pytest.mark.parametrize(("form", "values"), LAWS[:4], ids=NAMES[:4])
def test_no_other_split_of_the_budget_beats_the_optimum(form, values):
    budgets = np.array([1e19, 1e22, 1e25])
    N, D = compute_optimal(form, values, budgets)
    np.testing.assert_allclose(6 * N * D, budgets)
    best = form.predict(values, parameters=N, tokens=D)
    for factor in (0.9, 1.1):
        assert (form.predict(values, parameters=N * factor, tokens=D / factor) > best).all()
    slope = np.log(N[2] / N[0]) / np.log(1e6)
    assert allocation(form, values) == pytest.approx(slope, rel=1e-6)


def test_the_optimum_of_chinchilla_in_closed_form():
    """Hoffmann et al. 2022, eq. 4."""
    a, G = 0.37 / 0.71, (0.34 * 400 / (0.37 * 2000)) ** (1 / 0.71)
    N, _ = compute_optimal(CHINCHILLA, BASE, [1e21])
    assert pytest.approx(G * (1e21 / 6) ** a, rel=1e-10) == N


def test_predictions_of_replicates_have_a_row_each():
    values = np.tile(CHINCHILLA.vector(BASE), (4, 1))
    theta = dict(parameters=[1e9, 1e10], tokens=1e11)
    assert CHINCHILLA.predict(values, **theta).shape == (4, 2)
    assert compute_optimal(CHINCHILLA, values, [1e20, 1e21, 1e22])[1].shape == (4, 3)


def test_missing_columns_and_parameters_are_refused():
    with pytest.raises(UserError, match="missing: tokens"):
        CHINCHILLA.predict(BASE, parameters=1e9)
    with pytest.raises(UserError, match="the parameters are A, B, E, alpha, not"):
        SHARED_EXPONENT.predict(BASE, parameters=1e9, tokens=1e9)
    with pytest.raises(UserError, match="does not read N and D"):
        compute_optimal(FRONTIER, {"K": 9.0, "E": 1.7, "gamma": 0.1}, 1e20)
    with pytest.raises(UserError, match="no power law of compute"):
        allocation(DATA_CONSTRAINED, BASE | {"R_D": 3.0})
    with pytest.raises(UserError, match="reads the unique tokens"):
        compute_optimal(DATA_CONSTRAINED, BASE | {"R_D": 3.0}, 1e20)
