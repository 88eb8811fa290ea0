"""The compute multiplier of two recipes, on laws whose multiplier is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.analysis.comparison import Comparison, LossPath, as_dict, compare
from forescale.scaling.analysis.ratio import inverse
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.laws import CHINCHILLA
from tests.trainer.scaling.iso_flop_runs import TRUTH, iso_flop_table
from tests.trainer.scaling.some_laws import LAWS

BUDGETS = np.geomspace(1e18, 1e21, 4)


def table(gain=1.0, noise=0.0, seed=0, sizes=5):
    """Runs of a recipe that needs `gain` times less compute for every loss than TRUTH."""
    return iso_flop_table(BUDGETS, sizes=sizes, noise=noise, seed=seed, gain=gain)


def compared(one, other, target=None, **keys) -> Comparison:
    """The comparison of two tables named a and b."""
    keys = {"bootstraps": 100, "near": None, "method": "law"} | keys
    job = StudyJob(input=["none"], target=target or TargetPoint(), **keys)
    return compare([("a", one, "a.csv"), ("b", other, "b.csv")], job)


@pytest.fixture(scope="module")
def twice() -> Comparison:
    """Of TRUTH and a recipe that needs half the compute, at ten times the most expensive run."""
    return compared(table(), table(gain=2.0), TargetPoint(flops=1e22))


def test_a_recipe_that_needs_half_the_compute_has_a_multiplier_of_two(twice):
    comparison = twice
    assert comparison.mean.value == pytest.approx(2, rel=1e-4)
    assert comparison.trend.value == pytest.approx(1, abs=1e-4)
    assert comparison.crossing is None
    assert [p.multiplier.value for p in comparison.places] == pytest.approx([2] * 25, rel=1e-4)
    assert comparison.target.flops == pytest.approx((1e22, 5e21), rel=1e-3)
    low, high = comparison.places[-1].flops[0], comparison.places[0].flops[0]
    assert (high, low) == pytest.approx((2e18, 1e21), rel=1e-3)
    assert "b reaches the same loss with 2 times less compute than a" in comparison.verdict(
        comparison.mean
    )


def test_the_loss_ratio_is_that_of_both_laws_at_the_compute_of_the_first(twice):
    place = twice.places[7]
    at = np.array([place.flops[0]])
    assert place.loss_ratio.value == pytest.approx(float(twice.b.loss(at)[0]) / place.loss)
    assert place.loss_ratio.value < 1


def test_a_target_with_both_n_and_d_is_compared_at_its_tokens_per_parameter():
    target = TargetPoint(parameters=1e9, tokens=4e11)  # 400, at C = 2.4e21
    comparison = compared(table(), table(gain=3.0), target)
    assert comparison.a.path.ratio == pytest.approx(400)
    assert comparison.target.loss == pytest.approx(
        float(CHINCHILLA.predict(TRUTH, parameters=1e9, tokens=4e11)[0]), rel=1e-4
    )
    assert comparison.target.multiplier.value == pytest.approx(3, rel=1e-3)


def test_exchanging_the_two_inverts_every_ratio_and_its_interval():
    comparison = compared(table(noise=0.002, seed=1), table(gain=1.3, noise=0.002, seed=2))
    back = Comparison(comparison.b, comparison.a)
    for there, here in ((back.mean, comparison.mean), (back.trend, comparison.trend)):
        side = inverse(here)
        assert (there.value, there.low, there.high) == pytest.approx(
            (side.value, side.low, side.high)
        )


def test_laws_that_cross_are_said_to_cross():
    """The second recipe starts better and has a larger irreducible loss."""
    other = table(gain=4.0)
    other["loss"] += 0.15
    comparison = compared(table(), other)
    at = comparison.crossing
    assert at is not None
    flops = [side.flops(np.array([at]))[0] for side in (comparison.a, comparison.b)]
    assert flops[0] == pytest.approx(flops[1], rel=0.02)
    assert f"above a loss of {at:.4g} b needs less compute, below a." in comparison.summary
    assert Comparison(comparison.b, comparison.a).summary == comparison.summary


def test_recipes_without_a_common_loss_need_a_target():
    far = table(gain=1e4)
    with pytest.raises(UserError, match=r"no loss is reached by both .* a goes from"):
        compared(table(), far)
    comparison = compared(table(), far, TargetPoint(flops=1e22))
    assert (comparison.mean, comparison.places) == (None, [])
    assert comparison.headline is comparison.target.multiplier
    assert comparison.target.multiplier.value == pytest.approx(1e4, rel=0.02)


def test_a_loss_that_one_side_never_reaches_is_said_so():
    worse = table()
    worse["loss"] += 0.6
    comparison = compared(table(), worse, TargetPoint(flops=2e22))
    assert comparison.target.multiplier.value == 0
    assert comparison.verdict(comparison.target.multiplier) == (
        "By its law, b never reaches that loss; a does."
    )
    result = as_dict(comparison)["target"]
    assert (result["multiplier"]["value"], result["flops"][1]) == (None, None)


def test_losses_that_are_not_comparable_are_refused():
    one, other = table().assign(vocab_size=256), table().assign(vocab_size=512)
    with pytest.raises(UserError, match="losses are not comparable: vocab_size is 256 and 512"):
        compared(one, other)


def test_a_law_of_repeated_data_is_refused_by_its_key():
    one = table().assign(unique_tokens=lambda t: t.tokens / 4)
    with pytest.raises(UserError, match="form=data-constrained: the optimum is no power law"):
        compared(one, one, form="data-constrained")


def test_doubts_of_the_comparison_are_notes(twice):
    assert any("don't say what their losses are measured on" in note for note in twice.notes)
    assert any("10 times a's and 5 times b's most expensive run" in note for note in twice.notes)
    rows = table()  # a doubt about one side is one about the comparison
    within = compared(rows, pd.concat([rows, rows.iloc[[3]]]), TargetPoint(flops=1e20)).notes
    assert not any("most expensive run" in note for note in within)
    assert any(note.startswith("b: ") and "twice" in note for note in within), within


@pytest.mark.parametrize("form", ["frontier", "kaplan", "shared-exponent", "over-training"])
def test_other_laws_of_equal_tables_have_a_multiplier_of_one(form):
    best = table(sizes=3) if form != "frontier" else table(sizes=3).iloc[1::3]
    comparison = compared(best, best, form=form)
    assert comparison.mean.value == pytest.approx(1, abs=1e-9)
    assert comparison.mean.includes_one


def test_the_comparison_for_programs_has_the_verdict(twice):
    comparison = as_dict(twice)
    assert comparison["multiplier"]["value"] == pytest.approx(2, rel=1e-4)
    assert comparison["multiplier"]["includes_one"] is False
    assert [f["extrapolation_factor"] for f in comparison["predictions"]] == pytest.approx([10, 10])
    assert [side["name"] for side in comparison["sides"]] == ["a", "b"]


@pytest.mark.slow  # 50 pairs of studies
def test_the_interval_of_the_multiplier_covers_the_truth():
    """Nominal 90 % over pairs of studies of 20 runs with a noise of 0.3 %, of a gain of 1.3."""
    covered = np.zeros((50, 2))
    for i in range(len(covered)):
        one = table(noise=0.003, seed=1000 + 2 * i)
        other = table(gain=1.3, noise=0.003, seed=1001 + 2 * i)
        comparison = compared(one, other)
        last = comparison.places[-1].multiplier
        covered[i] = [r.low <= 1.3 <= r.high for r in (comparison.mean, last)]
    assert (covered.mean(0) > 0.82).all(), covered.mean(0)


_PLAIN = {"parameters", "tokens", "flops"}
WITHOUT_DATA = [(form, values) for form, values in LAWS if set(form.columns) <= _PLAIN]
NAMES = [form.name for form, _ in WITHOUT_DATA]
LOG_C = np.log(np.geomspace(1e17, 1e23, 7))


def path(form) -> LossPath:
    return LossPath(form, 6.5, None, float(np.log(1e10)), float(np.log(1e30)))


@pytest.mark.parametrize(("form", "values"), WITHOUT_DATA, ids=NAMES)
def test_the_compute_of_a_loss_is_the_inverse_of_the_loss(form, values):
    side = path(form)
    both = np.stack((form.vector(values), form.vector(values) * 1.03))
    losses = np.exp(side.log_loss(both, LOG_C))
    for row, loss in enumerate(losses):
        assert side.log_compute(both, loss)[row] == pytest.approx(LOG_C, abs=1e-6)


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
    side = replace(path(form), ratio=100.0)
    assert side.log_loss(vector, LOG_C)[0] == pytest.approx(expected, abs=1e-12)


def test_a_loss_that_is_never_reached_is_at_an_end():
    form, values = LAWS[0]
    side = path(form)
    comparison = side.log_compute(form.vector(values)[None], np.array([values["E"] - 0.1, 1e9]))[0]
    assert comparison.tolist() == [side.greatest, side.least]
