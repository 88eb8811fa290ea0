"""The choice of additional runs: its rules, its effect, and replays with known losses."""

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.scaling.design.next_runs import candidates_of, recommend, show
from forescale.scaling.design.shapes import Common
from forescale.scaling.design.simulate import RunSet
from forescale.scaling.fitting import bootstrap
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.laws import CHINCHILLA, FRONTIER
from forescale.scaling.fitting.points import Points
from forescale.scaling.forecasting.calibrated import calibrate
from forescale.scaling.forecasting.predictor import Discrepancy
from tests.benchmarks.bench_next import public, replay, replay_of, surface

COMMON = Common(ModelConfig(width=128, num_layers=3, num_heads=2), 512, 256, rate=1e10)
NONE = Points(np.array([9.0]), np.array([1.0]), np.array([1.0]))  # no candidate equals it
TARGET = RunSet(*np.array([[3e9], [6e10], [1.08e21]]))
CAP = 1e21


@pytest.fixture(scope="module")
def law():
    """The law of the three cheapest budgets, to 1e19 FLOPs."""
    points, budgets = surface("nothing", 3)
    results = fit(CHINCHILLA, points.take(budgets < 1.1e19))
    return calibrate(results, bootstrap.pairs(results, 10), Discrepancy())


@pytest.fixture(scope="module")
def offered():
    points, budgets = surface("nothing", 3)
    left = points.take(budgets > 1.1e19)
    return RunSet(left.parameters, left.tokens, left.flops)


def test_chosen_runs_stay_within_the_cap_and_each_lowers_the_variance(law, offered):
    left = list[float]()
    for cap in (5e19, 2e20, 1e21, 3e21):
        choices = recommend(law, offered, TARGET, cap)
        left.append(choices[-1].after)
        assert 0 < sum(c.flops for c in choices) <= cap
        assert len({(c.parameters, c.tokens) for c in choices}) == len(choices)
        ends = [choices[0].before, *(c.after for c in choices)]
        assert (np.diff(ends) < 0).all()
        assert [c.before for c in choices] == ends[:-1]
    assert left == sorted(left, reverse=True), "a larger cap never leaves more"


def test_the_choice_leaves_less_variance_than_random_or_cheapest_runs(law, offered):
    """By its own measure, with the same cap, against fifty random sets and the cheapest runs."""
    best = recommend(law, offered, TARGET, CAP)[-1].after
    rng, order = np.random.default_rng(0), np.argsort(offered.flops)
    for drawn in (order, *(rng.permutation(len(order)) for _ in range(50))):
        affordable = drawn[np.cumsum(offered.flops[drawn]) <= CAP]
        if len(affordable):
            some = RunSet(*(column[affordable] for column in vars_of(offered)))
            assert best <= recommend(law, some, TARGET, CAP)[-1].after * (1 + 1e-9)


def test_discrepancy_moves_the_choice_toward_the_target(law, offered):
    """If the law held everywhere, cheap runs far away would tell as much."""

    def most_expensive(discrepancy):
        changed = replace(law, discrepancy=Discrepancy(discrepancy))
        return max(c.flops for c in recommend(changed, offered, TARGET, CAP))

    assert most_expensive(0.1) > most_expensive(0.0)


def test_the_promised_variance_is_reached_when_the_runs_are_known(law, offered):
    """Without discrepancy: the variance before any loss is known equals the one afterwards."""
    exact = replace(law, discrepancy=Discrepancy(0.0))
    choices = recommend(exact, offered, TARGET, CAP)
    n, d, c = np.array([vars_of(x) for x in choices]).T
    new = (law.fit.predict(parameters=n, tokens=d), n, d, c)
    runs = law.fit.points
    columns = [np.append(a, b) for a, b in zip((runs.loss, *vars_of(runs)), new, strict=True)]
    later = replace(exact, fit=fit(CHINCHILLA, Points(*columns)))
    again = recommend(later, offered, TARGET, CAP)
    assert again[0].before == pytest.approx(choices[-1].after, rel=0.05)


def test_variances_of_several_targets_are_averaged(law, offered):
    two = RunSet(np.array([3e9, 1e9]), np.array([6e10, 2e10]), np.array([1.08e21, 1.2e20]))
    alone = [
        recommend(law, offered, RunSet(*(x[[i]] for x in vars_of(two))), CAP)[0].before
        for i in (0, 1)
    ]
    both = recommend(law, offered, two, CAP)[0].before
    assert both == pytest.approx(np.sqrt(np.mean(np.square(alone))))


def vars_of(design):
    return design.parameters, design.tokens, design.flops


def test_candidates_are_models_of_the_family_within_the_cap():
    choices = candidates_of(COMMON, 1e12, 1e14, NONE)
    assert choices.flops.min() == pytest.approx(1e12)
    assert choices.flops.max() <= 1e14
    assert len(np.unique(choices.flops)) == 9
    ratio = choices.tokens / choices.parameters
    assert 3 < ratio.min() < 10 < 20 < ratio.max() < 130
    assert len(choices.flops) > 4 * 9
    for n, d, c in list(zip(*vars_of(choices), strict=True))[::10]:
        shape = COMMON.family.solve(n)
        assert shape.parameters == n
        assert d * COMMON.per_token(shape.model)["causal"] == pytest.approx(c)
    once = Points(np.array([3.0]), choices.parameters[:1] * 1.005, choices.tokens[:1])
    assert len(candidates_of(COMMON, 1e12, 1e14, once).flops) == len(choices.flops) - 1, "known"
    few = candidates_of(replace(COMMON, unique=1e7), 1e12, 1e14, NONE)
    assert few.tokens.max() <= 1e7


def test_the_table_shows_the_runs_and_the_remaining_uncertainty(law, offered):
    choices = recommend(law, offered, TARGET, CAP)
    page = StringIO()
    show(choices, Console(file=page, width=120), rate=4e14)
    text = page.getvalue()
    assert f"{choices[0].parameters:.4g}" in text
    assert f"{len(choices)} runs" in text
    assert f"{choices[-1].after:.2%}" in text
    assert "device-hours" in text


def test_impossible_choices_are_refused(law, offered):
    with pytest.raises(UserError, match="cheapest candidate"):
        recommend(law, offered, TARGET, 1e17)
    with pytest.raises(UserError, match="less than the cheapest run"):
        candidates_of(COMMON, 1e14, 1e12, NONE)
    with pytest.raises(UserError, match="no model of this family"):
        candidates_of(replace(COMMON, unique=10.0), 1e12, 1e14, NONE)
    points, budgets = surface("nothing", 0)
    with pytest.raises(UserError, match="four or more"):
        replay(points, np.minimum(budgets, 1e19))
    flops = fit(FRONTIER, Points(points.loss, flops=points.flops))
    alone = calibrate(flops, bootstrap.pairs(flops, 10), Discrepancy())
    with pytest.raises(UserError, match="no column 'parameters'"):
        recommend(alone, offered, TARGET, CAP)


def test_a_replay_is_reproducible_and_both_choices_start_alike():
    points, budgets = surface("walk", 0)
    near = budgets < 1.1e20  # five of them
    few, runs = points.take(near), budgets[near]
    one, two = (replay(few, runs, (0.3,), seeds=(0,)) for _ in range(2))
    assert (one.rule == two.rule).all()
    assert (one.random == two.random).all()
    assert one.rule.shape == (1, 1)
    assert (one.start == two.start).all()
    assert one.rule[0, 0] != one.start[0] != one.random[0, 0]


@pytest.mark.slow  # 40 replays
@pytest.mark.parametrize("kind", ["slope", "walk"])
def test_the_choice_beats_a_random_one_when_the_truth_leaves_the_law(kind):
    """At a tenth of the cost of all runs, predicted by the law that chooses. At 3 % it doesn't: see
    tests/benchmarks/bench_next.py."""
    results = replay_of(kind, 40, "process", 0.1)
    assert results.rule.mean() < results.random.mean()


@pytest.mark.slow  # 40 replays
def test_the_choice_beats_a_random_one_on_the_chinchilla_runs(published):
    """At 10 % and 30 % of the cost, over twenty pools."""
    points, budgets = public()["Chinchilla"]
    results = replay(points, budgets, (0.1, 0.3), range(20))
    assert (results.rule.mean(0) < results.random.mean(0)).all()
    assert (results.rule.mean(0) < 0.5 * results.start.mean()).all()
