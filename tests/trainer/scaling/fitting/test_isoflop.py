"""Parabolas through the runs of a budget: exact, noisy, refused, and those of public runs."""

import numpy as np
import pandas as pd
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.fitting.isoflop import isoflop
from forescale.scaling.fitting.laws import CHINCHILLA, compute_optimal
from forescale.scaling.fitting.points import Points
from tests.trainer.scaling.some_laws import BASE

BUDGETS = np.array([1e19, 1e20, 1e21, 1e22])


EVEN = np.linspace(-1.5, 1.5, 7)


def runs(offsets=EVEN, noise=0.0, seed=0, k=0.1, a=0.5, budgets=BUDGETS):
    """Exact parabolas about N* = k C^a, with sizes at log N* + offsets."""
    at = np.log(k) + a * np.log(budgets)[:, None]
    N, C = np.exp(at + offsets).ravel(), np.repeat(budgets, len(offsets))
    floor = 1.8 + 3 * (budgets[:, None] / 1e19) ** -0.1
    loss = (floor + 0.05 * np.broadcast_to(offsets, (len(budgets), len(offsets))) ** 2).ravel()
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    return dict(loss=loss, parameters=N, tokens=C / (6 * N)), C


def test_the_law_of_exact_parabolas_is_recovered():
    points, C = runs(np.linspace(-1.0, 1.7, 6))
    analysis = isoflop(Points(**points), C)
    assert (analysis.parameters.k, analysis.parameters.a) == pytest.approx((0.1, 0.5))
    assert analysis.tokens.a == pytest.approx(0.5)
    assert analysis.tokens.k == pytest.approx(1 / 0.6)
    assert [v.floor for v in analysis.vertices] == pytest.approx(
        [4.8, 4.183, 3.693, 3.304], abs=1e-3
    )
    assert analysis.vertices[0].bend == pytest.approx(0.05)
    assert not analysis.refusals
    assert analysis.parameters(1e24) == pytest.approx(1e11)


@pytest.mark.parametrize("near", [None, 0.01])
def test_the_best_tokens_are_those_of_the_runs_however_compute_is_counted(near):
    points, C = runs(np.linspace(-1.0, 1.7, 6))
    per = 9 * (points["parameters"] / 1e9) ** 0.1  # C / (N D) grows with N
    points["tokens"] = C / (per * points["parameters"])
    analysis = isoflop(Points(**points, flops=C), C, near=near)
    best = np.array([0.1 * b**0.5 for b in BUDGETS])
    assert [v.parameters for v in analysis.vertices] == pytest.approx(best, rel=1e-6)
    tokens = BUDGETS / (9 * (best / 1e9) ** 0.1 * best)
    assert [v.tokens for v in analysis.vertices] == pytest.approx(tokens, rel=1e-6)
    assert analysis.tokens.a == pytest.approx(1 - 1.1 * 0.5)
    v = analysis.vertices[0]
    away = np.log(points["parameters"][:6] / v.parameters)
    assert np.exp(np.polyval(v.path, away)) == pytest.approx(points["tokens"][:6])


def test_rounded_budgets_change_no_law():
    points, C = runs()
    points["tokens"] *= np.repeat([1.04, 0.97, 1.02, 0.96], len(EVEN))
    exact = isoflop(Points(**points), C * np.repeat([1.04, 0.97, 1.02, 0.96], len(EVEN)))
    named = isoflop(Points(**points), C)
    assert named.parameters.a == exact.parameters.a
    assert named.tokens.k == exact.tokens.k
    assert [v.budget for v in named.vertices] == pytest.approx(
        BUDGETS * np.array([1.04, 0.97, 1.02, 0.96])
    )


def test_runs_far_from_the_optimum_dont_bend_the_parabolas_of_near():
    """The loss rises as a power law on one side: no parabola of log N."""
    offsets = np.linspace(-2.5, 2.5, 11)
    points, C = runs(offsets)
    steep = np.tile(np.where(offsets < -1, -offsets - 1, 0), len(BUDGETS))
    points["loss"] += 0.5 * steep**3 * (C / 1e19) ** 0.1  # the more, the larger the budget
    far, close = (isoflop(Points(**points), C, near=near) for near in (None, 0.02))
    assert abs(close.parameters.a - 0.5) < 0.001 < abs(far.parameters.a - 0.5)
    assert close.vertices[0].runs < far.vertices[0].runs == 11
    assert close.vertices[0].sizes[0] > far.vertices[0].sizes[0]


def test_the_sizes_beside_the_best_are_kept_at_any_distance():
    """All but the smallest size are near: a parabola without it would have no left side."""
    offsets = np.array([-1.0, 0.1, 0.2, 0.3, 0.4])
    points, C = runs(offsets)
    points["loss"][offsets.size * np.arange(4)] *= 1.5
    points["loss"] += np.tile([0, 0, 0.01, 0.02, 0.03], 4)
    analysis = isoflop(Points(**points), C, near=0.02)
    assert not analysis.refusals
    assert [v.runs for v in analysis.vertices] == [5] * 4


PUBLISHED = {  # exponents of N* of Porian et al. 2024 and of the Llama 3 paper
    "porian_owt2_long_kaplan_count": 0.864,
    "porian_owt2_long": 0.699,
    "porian_owt2_short": 0.603,
    "porian_owt2_cosine": 0.574,
    "porian_owt2_tuned": 0.518,
    "llama3": 1 - 0.537,
}


def test_published_exponents_are_met_nearer_the_optimum(published):
    def errors(near):
        for name, a in PUBLISHED.items():
            t = pd.read_csv(published / "backtest" / f"{name}.csv")
            columns = {k: t[k].to_numpy() for k in ("loss", "parameters", "tokens", "flops")}
            law = isoflop(Points(**columns), t["budget"], near, count=200).parameters
            yield abs(law.a - a), np.diff(law.interval(0.9)[:, 1])[0]

    close, far = (np.mean(list(errors(near)), axis=0) for near in (0.04, None))
    assert close[0] < 0.01 < far[0]
    assert close[1] < 0.04 < 0.08 < far[1]


@pytest.mark.parametrize("a", [0.4, 0.6])
def test_the_interval_covers(a):
    inside = 0
    for seed in range(60):
        points, C = runs(noise=0.002, seed=seed, a=a, k=1e8 / 1e19**a)
        low, high = isoflop(Points(**points), C, count=300).parameters.interval(0.9)
        inside += bool(low[1] <= a <= high[1])
    assert inside >= 48


def test_a_chinchilla_surface_has_nearly_the_allocation_of_its_exponents():
    budgets = np.geomspace(1e19, 1e23, 5)
    best = compute_optimal(CHINCHILLA, BASE, budgets)[0]
    N = (best[:, None] * np.exp(np.linspace(-1, 1, 9))).ravel()
    C = np.repeat(budgets, 9)
    loss = CHINCHILLA.predict(BASE, parameters=N, tokens=C / 6 / N)
    analysis = isoflop(Points(loss, parameters=N, tokens=C / 6 / N), C)
    assert analysis.parameters.a == pytest.approx(0.37 / 0.71, abs=0.002)


def refused(runs, C):
    analysis = isoflop(Points(**runs), C)
    assert len(analysis.vertices) == 3
    assert analysis.parameters.a == pytest.approx(0.5)  # the law uses the others alone
    (one,) = analysis.refusals
    assert one.budget == 1e20
    return one.why


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda y: 8 - y, "no minimum"),
        (lambda y: 4 + 0.05 * (EVEN - 2) ** 2, "is above all of its sizes"),
        (lambda y: 4 + 0.05 * (EVEN + 2) ** 2, "is below all of its sizes"),
        (
            lambda y: np.append(4 + 0.5 * (EVEN[:-1] - 1.2) ** 2, 3.99),
            "at its smallest or largest size",
        ),
    ],
)
def test_a_budget_whose_parabola_has_no_vertex_is_refused(losses, message):
    points, C = runs()
    points["loss"][C == 1e20] = losses(points["loss"][C == 1e20])
    assert message in refused(points, C)


def test_a_budget_with_a_wide_range_of_compute_is_refused():
    points, C = runs()
    points["tokens"][np.flatnonzero(C == 1e20)[::2]] *= 1.2
    why = refused(points, C)
    assert "range from 1e+20 to 1.2e+20 FLOPs, which is not one budget" in why


def test_two_sizes_are_refused_and_a_law_needs_two_vertices():
    points, C = runs()
    keep = (C != 1e20) | (np.arange(len(C)) % 7 < 2)
    few = {k: v[keep] for k, v in points.items()}
    assert refused(few, C[keep]) == "2 sizes don't determine a parabola"
    keep = C == 1e19
    with pytest.raises(UserError, match="1 of 1 budgets have a vertex"):
        isoflop(Points(**{k: v[keep] for k, v in points.items()}), C[keep])
    with pytest.raises(UserError, match="give every run one, in FLOPs"):
        isoflop(Points(**points), C * np.nan)


def test_the_interval_of_three_budgets_of_three_runs_is_nan():
    points, C = runs(np.array([-1.0, 0.2, 1.1]), budgets=BUDGETS[:3])
    analysis = isoflop(Points(**points), C)
    assert np.isnan(analysis.parameters.interval()).all()
    assert np.isnan(analysis.parameters.interval(flops=[1e24])).all()
