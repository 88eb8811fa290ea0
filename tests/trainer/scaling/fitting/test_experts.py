"""The law of mixtures of experts, against the numbers that its paper prints."""

import numpy as np
import pandas as pd
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.bootstrap import pairs
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.laws import CHINCHILLA, EXPERTS, compute_optimal
from forescale.scaling.fitting.points import Points
from forescale.scaling.report.fit_figures import Figures
from tests.trainer.scaling.some_laws import MIXTURE

DENSE = {s: MIXTURE[s] for s in CHINCHILLA.symbols}


def runs(seed: int = 0, noise: float = 0.003, n: int = 280) -> Points:
    """Runs of the paper's ranges: 79M to 2.7B active parameters, 0.5B to 80B tokens, E to 32."""
    rng = np.random.default_rng(seed)
    N, D = np.exp(rng.uniform(np.log([[79e6], [5e8]]), np.log([[2.7e9], [80e9]]), (2, n)))
    columns = {"parameters": N, "tokens": D, "expansion": 2.0 ** rng.integers(0, 6, n)}
    loss = EXPERTS.predict(MIXTURE, **columns) * np.exp(noise * rng.standard_normal(n))
    return Points(loss, **columns)


def test_the_law_of_each_number_of_experts_is_that_of_table_4():
    """Printed for 1, 2, 4, 8, 16 and 32 experts: A, alpha, B and beta of the Chinchilla law."""
    table = {
        2: (27.7982, 0.1780, 66.8401, 0.2065), 4: (24.8462, 0.1731, 87.7022, 0.2192),
        8: (21.8330, 0.1676, 119.9126, 0.2338), 16: (19.0159, 0.1617, 167.5073, 0.2494),
        32: (16.5424, 0.1557, 234.6726, 0.2652),
    }  # fmt: skip
    N, D = np.geomspace(8e7, 3e9, 9), np.geomspace(8e10, 5e8, 9)
    for experts, (a, alpha, b, beta) in table.items():
        law = EXPERTS.predict(MIXTURE, parameters=N, tokens=D, expansion=experts)
        np.testing.assert_allclose(law, 1.3637 + a * N**-alpha + b * D**-beta, rtol=2e-3)


@pytest.mark.parametrize(
    ("flops", "experts", "n", "d"),
    [(1e20, 1, 1.7e9, 9.7e9), (1e21, 8, 3.8e9, 44.3e9), (1e22, 32, 12.2e9, 136.9e9)],
)
def test_the_compute_optimal_runs_of_table_1(flops, experts, n, d):
    law = compute_optimal(EXPERTS, MIXTURE, flops, expansion=experts)
    assert law == (pytest.approx(n, rel=0.03), pytest.approx(d, rel=0.03))
    with pytest.raises(UserError, match="reads the expansion; give expansion="):
        compute_optimal(EXPERTS, MIXTURE, flops)


def test_at_one_expert_it_is_the_dense_law():
    columns = {"parameters": np.array([1e8, 1e9]), "tokens": np.array([1e10, 3e10])}
    law = EXPERTS.predict(MIXTURE, **columns, expansion=1.0)
    np.testing.assert_allclose(law, CHINCHILLA.predict(DENSE, **columns), rtol=1e-12)


@pytest.mark.slow  # 100 fits of 200 bootstraps
def test_intervals_of_simulated_runs_cover_the_parameters():
    """Nominal 90 % of 9 parameters in 100 studies, within the error of 100 of them at 99 %. The
    intervals of one study hold their parameters together, or miss them: as one draw at worst."""
    studies, truth, inside = 100, EXPERTS.vector(MIXTURE), []
    for seed in range(studies):
        points = fit(EXPERTS, runs(seed))
        assert points.certificate.holds
        low, high = pairs(points, 200).interval(0.9)
        inside.append((low < truth) & (truth < high))
    assert np.mean(inside) == pytest.approx(0.9, abs=2.576 * np.sqrt(0.9 * 0.1 / studies))


def study(points: Points, **keys) -> StudyFit:
    columns = {c: getattr(points, c) for c in ("loss", "parameters", "tokens", "expansion")}
    job = StudyJob(input=["x"], bootstraps=100, **{"form": "experts"} | keys)
    return StudyFit(pd.DataFrame(columns), job, "runs")


def test_a_study_predicts_a_target_with_experts():
    target = TargetPoint(parameters=4e9, tokens=1e11, expansion=16)
    law = study(runs(n=120), target=target).predict()
    truth = EXPERTS.predict(MIXTURE, parameters=4e9, tokens=1e11, expansion=16)[0]
    assert law.loss == pytest.approx(truth, rel=0.01)
    with pytest.raises(UserError, match="target: has no expansion"):
        study(runs(n=120), target=TargetPoint(parameters=1e9, tokens=1e11)).predict()


def test_the_best_expansion_of_a_compute_fits_into_the_memory():
    """The best of a grid, by the law itself; without a bound, the most experts that runs had."""
    points, share, flops, most = runs(noise=0.002, n=90), 0.6, 1e21, 1e10
    e = np.geomspace(1, 32, 500)
    n = np.concatenate([compute_optimal(EXPERTS, MIXTURE, flops, expansion=x)[0] for x in e])
    n = np.minimum(n, most / (1 + share * (e - 1)))
    loss = EXPERTS.predict(MIXTURE, parameters=n, tokens=flops / 6 / n, expansion=e)
    bound = {"target": TargetPoint(flops=flops, most_parameters=most), "form": "experts"}
    one = study(points, **bound)
    with pytest.raises(UserError, match="add a column parameters_total"):
        one.predict()
    one.table["parameters_total"] = points.parameters * (1 + share * (points.expansion - 1))
    law = one.predict()
    low, high = law.best["expansion"]
    assert low < e[loss.argmin()] < high < 32
    assert law.parameters == pytest.approx(most / (1 + share * (law.settings["expansion"] - 1)))
    both = TargetPoint(flops=flops, parameters=1e9, most_parameters=most)
    with pytest.raises(UserError, match="chooses N and D of a compute"):
        one.predict(both)
    one.table.loc[3, "parameters_total"] = np.nan
    with pytest.raises(UserError, match="a run has no total parameters"):
        one.predict()
    free = study(points, target=TargetPoint(flops=flops))
    assert free.predict().settings["expansion"] == pytest.approx(32)
    assert "another one may be better" in " ".join(free.doubts)


def test_runs_of_one_expansion_are_refused():
    points = runs()
    one = points.take(points.expansion == 8)
    with pytest.raises(UserError, match=r"all runs have the same expansion; .* form=chinchilla"):
        study(one)


def test_total_parameters_are_refused_and_other_laws_doubted():
    points = runs(n=60)
    table = pd.DataFrame({c: getattr(points, c) for c in ("loss", "tokens", "expansion")})
    table = table.assign(parameters_blocks_and_head=points.parameters)
    with pytest.raises(UserError, match=r"doesn't use.*write size=active"):
        StudyFit(table, StudyJob(input=["x"], form="experts"), "runs")
    sentences = study(points, form="chinchilla").doubts
    assert "write form=experts" in sentences[0]


def test_each_expansion_has_its_own_best_runs_of_a_budget():
    """The dense runs, all worse than those with experts, are fitted too."""
    n = np.tile(np.geomspace(1e8, 1e9, 7), 6)
    budget, expansion = np.repeat([1e20, 4e20, 1.6e21], 14), np.tile(np.repeat([1.0, 32.0], 7), 3)
    columns = {"parameters": n, "tokens": budget / 6 / n, "expansion": expansion}
    table = pd.DataFrame(columns | {"loss": EXPERTS.predict(MIXTURE, **columns), "budget": budget})
    points = StudyFit(table, StudyJob(input=["x"], form="chinchilla", near=0.01), "runs")
    mask = table[points.is_fitted].groupby(["budget", "expansion"]).size()
    assert len(mask) == 6
    assert mask.min() >= 3
    assert isinstance(points.isoflop, str)


def test_figures_are_of_the_targets_expansion():
    target = TargetPoint(parameters=4e9, tokens=1e11, expansion=16)
    figures = Figures(points := study(runs(n=120), target=target), "active", "6ND", "nats")
    n, d = compute_optimal(EXPERTS, points.fit.vector, figures.grid, expansion=16)
    best = points.fit.predict(parameters=n, tokens=d, expansion=np.full_like(n, 16))
    np.testing.assert_allclose(figures.frontier["loss"][0], best)
