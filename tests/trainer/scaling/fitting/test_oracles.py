"""Fits of public data against the published tables.

The data can't be distributed with the code: without it these tests are skipped. If the published
parameters are not the minimum of their own objective, ours must be lower.
"""

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.fitting.bootstrap import pairs, replicates
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.isoflop import isoflop
from forescale.scaling.fitting.laws import CHINCHILLA, OVER_TRAINING, SHARED_EXPONENT
from forescale.scaling.fitting.objective import LEAST_ABSOLUTE, Objective
from forescale.scaling.fitting.points import Points
from tests.trainer.scaling.some_laws import certify


@pytest.fixture(scope="module")
def all_runs(published) -> Points:
    """Runs of Hoffmann et al. 2022, read off a figure by Besiroglu et al. (arXiv 2404.10102)."""
    table = pd.read_csv(published / "epoch_chinchilla" / "svg_extracted_data.csv")
    N, C = table["Model Size"].to_numpy(), table["Training FLOP"].to_numpy()
    return Points(table["loss"], parameters=N, tokens=C / (6 * N))


@pytest.fixture(scope="module")
def near(all_runs) -> np.ndarray:
    """Indices of all runs without the five largest losses."""
    return np.flatnonzero(all_runs.loss < np.sort(all_runs.loss)[-5])


@pytest.fixture(scope="module")
def epoch(all_runs, near) -> Points:
    assert len(near) == 240
    return all_runs.take(near)


def test_the_main_result_by_least_absolute_deviations(epoch):
    """Equal to the printed digits except the last ones of A and B, at a lower objective: the
    certified minimum is below every point that rounds to the printed exponents."""
    law = fit(CHINCHILLA, epoch, LEAST_ABSOLUTE)
    assert law.certificate.holds
    assert law.values["E"] == pytest.approx(1.81686, abs=5.1e-6)
    assert law.values["alpha"] == pytest.approx(0.34781, abs=5.1e-6)
    assert law.values["beta"] == pytest.approx(0.36585, abs=5.1e-6)
    assert law.values["A"] == pytest.approx(482.00572, rel=1e-6)
    assert law.values["B"] == pytest.approx(2085.43420, rel=2e-6)
    printed = {"A": 482.00572, "B": 2085.43420, "E": 1.81686}
    rounding = np.linspace(-5e-6, 5e-6, 21)
    values = np.array(
        [[*printed.values(), 0.34781 + i, 0.36585 + j] for i in rounding for j in rounding]
    )
    m = np.log(CHINCHILLA.predict(values, parameters=epoch.parameters, tokens=epoch.tokens))
    assert law.value / LEAST_ABSOLUTE.delta < np.abs(np.log(epoch.loss) - m).sum(1).min()


def test_standard_errors_of_the_main_result(epoch):
    """Printed, from 4,000 pairs bootstraps: 124.52, 1293.28, 0.02566, 0.01540, 0.02060."""
    law = pairs(fit(CHINCHILLA, epoch), 4000)
    printed = {"A": 124.52, "B": 1293.28, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}
    assert law.errors == pytest.approx(printed, rel=0.15)


def test_the_huber_objective_of_the_papers(epoch):
    """Lower than the 4,500 published starts of L-BFGS-B reach, and the lowest known."""
    law = fit(CHINCHILLA, epoch)
    published = {
        "A": 477.8417, "B": 2143.8638, "E": 1.8172355, "alpha": 0.34731266, "beta": 0.36718262,
    }  # fmt: skip
    value, published_values = certify(CHINCHILLA, epoch, published)
    assert value == pytest.approx(0.0010182740346, abs=1e-12)
    assert not published_values.holds
    assert published_values.scaled_gradient > 1e-5
    assert law.certificate.holds
    assert law.value < min(value, 0.0010182740346)
    assert law.value == pytest.approx(0.0010182740178, abs=6e-14)
    assert law.values["A"] == pytest.approx(477.826, abs=6e-4)
    assert law.values["B"] == pytest.approx(2143.417, abs=6e-4)
    assert law.values == pytest.approx(published, rel=3e-4)
    assert len(law.certificate.minima) == 1
    assert law.certificate.failed_starts == 0


def test_all_245_runs(all_runs):
    law = fit(CHINCHILLA, all_runs, LEAST_ABSOLUTE)
    e = np.exp([6.13834459, 9.43584213, 0.63412782])
    printed = {"A": e[0], "B": e[1], "E": e[2], "alpha": 0.3453568, "beta": 0.45189211}
    assert law.values == pytest.approx(printed, rel=4e-6)
    value, published_values = certify(CHINCHILLA, all_runs, printed, LEAST_ABSOLUTE)
    assert law.certificate.holds
    assert not published_values.holds
    assert law.value < value


def test_intervals_of_the_same_4000_resamples(epoch, near):
    """Drawn by numpy's legacy generator with seed 42, as for the table. All ten ends agree to the
    printed digits except the lower one of A (286.1 for 285.2), which is not explained."""
    rng = np.random.RandomState(42)
    place = {run: i for i, run in enumerate(near.tolist())}
    draws = [rng.choice(near.tolist(), size=240, replace=True) for _ in range(4000)]
    w = np.stack([np.bincount([place[r] for r in d], minlength=240) for d in draws])
    law = replicates(fit(CHINCHILLA, epoch), weights=w)
    assert law.uncertified == 0
    assert law.solved.gradient.max() < 1e-8
    low, high = law.interval(0.95, method="percentile")
    np.testing.assert_allclose(high, [743.6, 5810.3, 1.871, 0.373, 0.415], atol=0.06)
    np.testing.assert_allclose(high[2:], [1.871, 0.373, 0.415], atol=6e-4)
    np.testing.assert_allclose(low[1:], [1042.4, 1.769, 0.317, 0.331], atol=0.06)
    np.testing.assert_allclose(low[2:], [1.769, 0.317, 0.331], atol=6e-4)
    assert low[0] == pytest.approx(285.2, abs=1.0)


def test_the_law_of_gadre_predicts_its_two_larger_runs(published):
    """Five small runs of RedPajama, loss on C4: relative errors of 0.7103 and 0.7320 %."""
    table = pd.read_csv(published / "gadre2024" / "gadre_104_models.csv")
    runs = table[table.dataset == "rpj"].set_index("name")
    small = ("96_l=8_h=4-1.0", "512_l=8_h=4-1.0", "576_l=24_h=8-1.0", "1024_l=24_h=8-1.0")
    five = runs.loc[[*(f"rpj-d={s}" for s in small), "rpj-d=96_l=8_h=4-16.0"]]
    points = Points(five.loss_c4_val, parameters=five.N, tokens=five.D)
    goal = Objective(np.inf, "loss")
    law = fit(OVER_TRAINING, points, goal)
    assert law.certificate.holds
    for name, error in (("rpj-open_lm_1b-32.0", 0.7103), ("rpj-open_lm_7b-1.0", 0.7320)):
        run = runs.loc[name]
        loss = law.predict(parameters=run.N, tokens=run.D)[0]
        assert 100 * abs(loss / run.loss_c4_val - 1) == pytest.approx(error, abs=6e-5)
    plain = fit(SHARED_EXPONENT, points, goal)
    assert plain.value == pytest.approx(law.value)


@pytest.mark.parametrize(
    ("table", "runs", "vpnls", "scalefit"),
    [("chinchilla", 124, 13.1, 13.4), ("llama3", 133, 2.3, 2.4), ("marin_comma", 85, 22.9, 23.5)],
)
def test_the_raw_loss_objective_of_vpnls_and_scalefit(published, table, runs, vpnls, scalefit):
    """The README of Open-Athena/vpnls prints Huber's objective (delta 1e-3, raw loss, mean over the
    runs, in 1e-6) that it and apple/ml-scalefit reach."""
    rows = pd.read_csv(published / "backtest" / f"{table}.csv")
    points = Points(rows.loss, parameters=rows.parameters, tokens=rows.tokens)
    law = fit(CHINCHILLA, points, Objective(1e-3, "loss"))
    assert len(points) == runs
    assert law.certificate.holds
    assert law.value / runs * 1e6 == pytest.approx(vpnls, abs=0.05)
    assert law.value / runs * 1e6 < scalefit - 0.04


def test_the_raw_loss_parameters_of_vpnls(published):
    """Printed for the Chinchilla runs, N in millions and D in billions, on a grid of exponents in
    steps of 0.01. The objective is lower between the grid's points."""
    rows = pd.read_csv(published / "backtest" / "chinchilla.csv")
    points = Points(rows.loss, parameters=rows.parameters / 1e6, tokens=rows.tokens / 1e9)
    goal = Objective(1e-3, "loss")
    printed = {"A": 4.1479, "B": 1.0546, "E": 1.8608, "alpha": 0.36, "beta": 0.40}
    value, published_values = certify(CHINCHILLA, points, printed, goal)
    assert fit(CHINCHILLA, points, goal).value < value
    assert not published_values.holds


def test_the_isoflop_law_of_llama_3(published):
    """Grattafiori et al. 2024 (arXiv 2407.21783), section 3.2.1: D* = 0.29 C^0.53, 402B parameters
    and 16.55T tokens at 3.8e25 FLOPs. A parabola refit of the digitised points: 0.2994 C^0.5368."""
    table = pd.read_csv(published / "llama3_isoflops" / "llama_3.csv")
    table = table[table.experiment == "llama_3__raw_loss"]
    points = Points(table.loss, parameters=table.params, tokens=table.tokens)
    law = isoflop(points, table.budget)
    assert law.tokens.a == pytest.approx(0.5368, abs=6e-5)
    assert law.tokens.k == pytest.approx(0.2994, abs=6e-5)
    assert not law.refusals
    low, high = law.tokens.interval(0.95)
    assert low[1] < 0.53 < high[1]
    assert law.tokens(3.8e25) == pytest.approx(16.55e12, rel=0.05)
    assert law.parameters(3.8e25) == pytest.approx(402e9, rel=0.05)
