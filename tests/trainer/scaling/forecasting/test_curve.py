"""The curve of a run to come: from simulated runs of a law, ahead of the cheaper ones."""

import numpy as np
import pytest

from forescale.scaling.forecasting.curve import SHARES, Curve, shape_of, smoothed

STEPS = 2000


def loss_of(n, d, shares):
    """A law of N and of the tokens so far, whose rate decays over the last fifth."""
    decay = np.clip((shares - 0.8) / 0.2, 0, 1)
    return 1.5 + 20 * n**-0.3 + 60 * (d * shares) ** -0.3 * (1 - 0.25 * decay)


def curve(n, d, noise=0.0, seed=0, steps=STEPS, first=1, offset=1.0):
    shares = np.arange(first, steps + 1) / steps
    end = float(loss_of(n, d, np.ones(1))[0])
    rng = np.random.default_rng(seed)
    losses = offset * loss_of(n, d, shares) * np.exp(noise * rng.standard_normal(len(shares)))
    return Curve(n, d, *smoothed(shares, losses, end), warmup=0.01)


SIZES = [(n, r * n) for n in (1e5, 2e5, 4e5, 8e5) for r in (10, 30)]


def test_the_curve_of_a_larger_run_is_predicted():
    runs = [curve(n, d, noise=0.01, seed=i) for i, (n, d) in enumerate(SIZES)]
    shape = shape_of(runs, 3e6, 6e7)
    truth = np.interp(shape.shares, SHARES, curve(3e6, 6e7).above)
    assert shape.runs == 8
    assert shape.shares[0] == pytest.approx(0.1)
    assert np.abs(shape.above - truth).mean() < 0.006
    assert np.abs((shape.above - truth) / shape.deviation).mean() < 1.2
    assert (np.diff(shape.deviation) <= 0).all()


def test_a_training_loss_below_the_held_out_one_is_part_of_the_curve():
    runs = [curve(n, d, offset=0.98) for n, d in SIZES]
    assert shape_of(runs, 3e6, 6e7).above[-1] == pytest.approx(np.log(0.98), abs=1e-3)


def test_two_runs_or_runs_without_their_first_steps_determine_no_curve():
    assert shape_of([curve(*size) for size in SIZES[:2]], 3e6, 6e7) is None
    assert shape_of([curve(*size, first=1500) for size in SIZES], 3e6, 6e7) is None


def test_the_deviation_grows_with_the_errors_of_earlier_forecasts():
    even = [curve(n, d) for n, d in SIZES]
    uneven = [
        Curve(c.parameters, c.tokens, c.above + 0.1 * (-1) ** i * (1 - SHARES), c.error)
        for i, c in enumerate(even)
    ]
    assert shape_of(uneven, 3e6, 6e7).deviation[0] > 3 * shape_of(even, 3e6, 6e7).deviation[0]
