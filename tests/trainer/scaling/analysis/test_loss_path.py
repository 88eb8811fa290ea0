"""The loss of a law along its compute-optimal runs, and its inverse."""

import numpy as np
import pytest

from forescale.scaling.analysis.loss_path import LossPath
from forescale.scaling.fitting import laws
from tests.trainer.scaling.some_laws import LAWS

_PLAIN = {"parameters", "tokens", "flops"}
WITHOUT_DATA = [(form, values) for form, values in LAWS if set(form.columns) <= _PLAIN]
NAMES = [form.name for form, _ in WITHOUT_DATA]
LOG_C = np.log(np.geomspace(1e17, 1e23, 7))


def path(form, ratio=None, per_token=6.5) -> LossPath:
    return LossPath(form, per_token, ratio, float(np.log(1e10)), float(np.log(1e30)))


@pytest.mark.parametrize(("form", "values"), WITHOUT_DATA, ids=NAMES)
def test_the_compute_of_a_loss_is_the_inverse_of_the_loss(form, values):
    own = path(form)
    both = np.stack((form.vector(values), form.vector(values) * 1.03))
    losses = np.exp(own.log_loss(both, LOG_C))
    for row, loss in enumerate(losses):
        assert own.log_compute(both, loss)[row] == pytest.approx(LOG_C, abs=1e-6)


@pytest.mark.parametrize(("form", "values"), WITHOUT_DATA, ids=NAMES)
def test_the_path_of_a_law_is_that_of_its_compute_optimal_runs(form, values):
    if form.columns == ("flops",):
        pytest.skip("the law reads C itself")
    vector = form.vector(values)
    n, d = laws.compute_optimal(form, vector, np.exp(LOG_C), 6.5)
    expected = np.log(form.predict(vector, parameters=n, tokens=d))
    assert path(form).log_loss(vector[None], LOG_C)[0] == pytest.approx(expected, abs=1e-12)


def test_a_path_at_a_fixed_ratio_has_that_many_tokens_per_parameter():
    form, values = LAWS[0]
    n = np.sqrt(np.exp(LOG_C) / (6.5 * 100))
    expected = np.log(form.predict(values, parameters=n, tokens=100 * n))
    vector = form.vector(values)[None]
    assert path(form, 100.0).log_loss(vector, LOG_C)[0] == pytest.approx(expected, abs=1e-12)


def test_a_loss_that_is_never_reached_is_at_an_end():
    form, values = LAWS[0]
    own = path(form)
    found = own.log_compute(form.vector(values)[None], np.array([values["E"] - 0.1, 1e9]))[0]
    assert found.tolist() == [own.greatest, own.least]
