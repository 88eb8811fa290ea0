"""Laws from a loss to an accuracy: derivatives, recovery, published numbers."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit

from forescale.ground.errors import UserError
from forescale.scaling.fitting.bootstrap import pairs
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.forms import design
from forescale.scaling.fitting.links import (
    COLUMN,
    GOAL,
    LINKS,
    NO_LOSS,
    Outcomes,
    from_chance,
    goal_of,
)

SIGMOID = {"a": -0.72, "L_0": 0.8, "k": 6.0, "b": 0.97}
EXPONENTIAL = {"epsilon": 0.86, "k": 2.2, "gamma": 0.71}
TO_ONE = {"c": 0.24, "L_0": 2.9, "k": 3.3}
POWER = {"E": 0.6, "K": 0.3, "kappa": 1.7}
KNOWN = [
    ("sigmoid-to-1", TO_ONE, (2.2, 4.0)),
    ("sigmoid", SIGMOID, (0.4, 1.4)),
    ("exponential", EXPONENTIAL, (2.2, 5.0)),
    ("power", POWER, (2.2, 5.0)),
]


def outcomes(link, values, ends, noise=0.0, count=40) -> Outcomes:
    """Runs of a link at losses between two ends, with noise of the accuracy."""
    loss = np.linspace(*ends, count)
    accuracy = LINKS[link].predict(values, task_loss=loss)
    accuracy += noise * np.random.default_rng(3).standard_normal(count)
    return Outcomes(accuracy, task_loss=loss)


def formula(link, values, loss):
    """The accuracy as the source prints it."""
    v = values
    if link == "power":
        return v["E"] + v["K"] * loss ** v["kappa"]
    if link == "sigmoid-to-1":
        return v["c"] + (1 - v["c"]) / (1 + np.exp(v["k"] * (loss - v["L_0"])))
    if link == "sigmoid":
        return v["a"] / (1 + np.exp(-v["k"] * (loss - v["L_0"]))) + v["b"]
    return 1 - (v["epsilon"] - v["k"] * np.exp(-v["gamma"] * loss))


each = pytest.mark.parametrize(("link", "values", "ends"), KNOWN)


@each
def test_a_link_is_the_formula_of_its_source_and_overflows_nowhere(link, values, ends):
    loss = np.linspace(*ends, 9)
    expected = formula(link, values, loss)
    assert LINKS[link].predict(values, task_loss=loss) == pytest.approx(expected, rel=1e-12)
    with np.errstate(all="raise", under="ignore"):
        law = LINKS[link].predict(values, task_loss=[1e-9, 1e3])
    assert np.isfinite(law).all()


@each
def test_derivatives_are_those_of_a_complex_step(link, values, ends):
    form = LINKS[link]
    at = design(form, outcomes(link, values, ends))
    theta = form.internal(form.vector(values)[None], at.centre)
    _, jacobian = form.evaluate(theta, at)
    for j in range(form.size):
        aside = theta.astype(complex)
        aside[:, j] += 1e-30j
        exact = form.evaluate(aside, at)[0].imag / 1e-30
        assert jacobian[:, j] == pytest.approx(exact, rel=1e-10, abs=1e-14)


@each
def test_runs_without_noise_give_their_link_back(link, values, ends):
    law = fit(LINKS[link], outcomes(link, values, ends), goal_of(LINKS[link]))
    assert law.certificate.holds
    assert law.values == pytest.approx(values, rel=1e-5)


@each
def test_intervals_of_noisy_runs_have_the_truth(link, values, ends):
    law = fit(LINKS[link], outcomes(link, values, ends, noise=0.005), goal_of(LINKS[link]))
    low, high = pairs(law, 200).interval(0.99)
    truth = law.form.vector(values)
    assert ((low < truth) & (truth < high)).all()


def test_a_held_chance_is_the_floor_and_the_rest_is_fitted():
    runs = outcomes("sigmoid-to-1", TO_ONE, (2.2, 4.0))
    law = fit(from_chance(0.24), runs, GOAL)
    assert law.certificate.holds
    assert law.values == pytest.approx({k: TO_ONE[k] for k in ("L_0", "k")}, rel=1e-5)
    assert law.predict(task_loss=50.0) == pytest.approx(0.24)
    assert from_chance(0).predict(law.values, task_loss=50.0) == pytest.approx(0, abs=1e-8)


def test_the_fit_is_no_worse_than_curve_fit():
    """Bounds and start are those of the sigmoid's source, and so is the point of no loss."""
    runs = outcomes("sigmoid", SIGMOID, (0.5, 1.1), noise=0.01)
    loss, accuracy = np.append(runs.task_loss, 0.0), np.append(runs.loss, 1.0)

    def sigmoid(x, a, middle, k, b):
        return formula("sigmoid", {"a": a, "L_0": middle, "k": k, "b": b}, x)

    limits = ([-1, 0, 0, 0], [0, np.inf, np.inf, 1])
    expected, _ = curve_fit(sigmoid, loss, accuracy, [-0.75, 0.9, 3.0, 1.0], bounds=limits)
    points = Outcomes(accuracy, task_loss=np.maximum(loss, NO_LOSS))
    law = fit(LINKS["sigmoid"], points, GOAL)
    assert law.certificate.holds
    assert law.value <= np.square(accuracy - sigmoid(loss, *expected)).sum() / 2 * (1 + 1e-7)
    assert law.vector == pytest.approx(expected, rel=1e-3)


def test_the_error_laws_of_gadre(published):
    """Printed for C4, RedPajama and RefinedWeb, from six runs each: epsilon, k, gamma."""
    table = pd.read_csv(published / "gadre2024" / "gadre_104_models.csv").set_index("name")
    small = ("d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8", "open_lm_1b")
    printed = {
        "c4_original": (0.850, 2.08, 0.756),
        "rpj": (0.857, 2.21, 0.715),
        "rw_original": (0.865, 2.21, 0.707),
    }
    for dataset, expected in printed.items():
        names = [f"{dataset}-{model}-1.0" for model in small] + [f"{dataset}-d=96_l=8_h=4-16.0"]
        six = table.loc[names]
        points = Outcomes(1 - six.err_avg_subset, task_loss=six.loss_c4_val)
        law = fit(LINKS["exponential"], points, GOAL)
        assert law.certificate.holds
        for value, number, digits in zip(law.vector, expected, (3, 2, 3), strict=True):
            assert round(value, digits) == number, dataset


def test_outcomes_refuse_a_loss_without_a_logarithm():
    with pytest.raises(UserError, match=f"{COLUMN}: 0.0 of run 1"):
        Outcomes(np.array([0.5, 0.6]), task_loss=np.array([1.0, 0.0]))
