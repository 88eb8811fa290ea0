"""Compute multipliers of simulated recipes, whose truth is known."""

import json

import numpy as np
import pandas as pd
import pytest

from forescale import cli
from forescale.config.compose import compose
from forescale.ground.errors import UserError
from forescale.scaling.analysis.multipliers import BaseCurve, Multipliers, as_dict, floor_of
from forescale.scaling.config import StudyJob
from forescale.scaling.report.recipes_page import _cells, _verdict, multipliers
from tests.trainer.scaling.simulated_recipes import BUDGETS, E, law, runs

JOB = compose(StudyJob, ["input=[none]"])
TRUE = {"good": 1.4, "bad": 0.7}


def multipliers_of(table, job=JOB) -> Multipliers:
    return Multipliers(table, job, "here")


def by_name(table) -> dict:
    return {c.name: c for c in multipliers_of(table).candidates}


def test_without_noise_each_multiplier_is_the_true_one():
    multipliers = by_name(runs(np.random.default_rng(0), TRUE, noise=0.0))
    for name, m in TRUE.items():
        values = [p.multiplier.value for p in multipliers[name].places]
        assert values == pytest.approx([m] * 3, rel=4e-3)
        assert multipliers[name].mean.value == pytest.approx(m, rel=4e-3)
        assert multipliers[name].trend.value == pytest.approx(1.0, abs=5e-3)


def test_a_multiplier_that_grows_has_its_trend():
    """1.2 at the lowest budget, and 1.3 times more in each decade."""
    table = runs(np.random.default_rng(0), {"new": lambda c: 1.2 * 1.3 ** np.log10(c / 1e11)}, 0.0)
    assert by_name(table)["new"].trend.value == pytest.approx(1.3, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.001, 0.003])
def test_nominal_90_percent_intervals_cover_within_binomial_error(noise):
    """120 simulated studies of three budgets and three seeds."""
    rng, hits, logs, studies = np.random.default_rng(1), [], [], 120
    for _ in range(studies):
        for name, one in by_name(runs(rng, TRUE, noise)).items():
            ratios = [*(p.multiplier for p in one.places), one.mean]
            hits.append([r.low <= TRUE[name] <= r.high for r in ratios])
            hits[-1].append(one.trend.low <= 1 <= one.trend.high)
            logs.append(np.log([r.value / TRUE[name] for r in ratios]))
    error = np.sqrt(0.9 * 0.1 / studies)  # of two recipes; they share a base, so count one
    assert np.mean(hits, axis=0) == pytest.approx(0.9, abs=3 * error)
    assert np.mean(hits) == pytest.approx(0.9, abs=2 * error)
    spread = np.std(logs, axis=0)
    assert (np.abs(np.mean(logs, axis=0)) < 3 * spread / np.sqrt(studies) + 0.004).all()


def test_other_costs_are_read_where_the_base_has_the_recipes_loss():
    """A step of `new` takes twice as long; N and D grow as the root of C, and `new` has a model of
    a quarter of the base's and four times the text."""
    table = runs(np.random.default_rng(0), {"new": 1.5}, noise=0.0)
    is_new = table["recipe"] == "new"
    root = np.sqrt(table["flops"] / BUDGETS[0])
    table["train_seconds"] = table["flops"] / 1e10 * np.where(is_new, 2, 1)
    table["parameters"] = 1e5 * root / np.where(is_new, 4, 1)
    table["bytes"] = 1e7 * root * np.where(is_new, 4, 1)
    table["device"] = "cpu"
    (new,) = multipliers_of(table).candidates
    for place in new.places:
        values = {name: ratio.value for name, ratio in place.others.items()}
        expected = {"seconds": 1.5 / 2, "parameters": 1.5**0.5 * 4, "bytes": 1.5**0.5 / 4}
        assert values == pytest.approx(expected, rel=0.01)
    table.loc[is_new, "device"] = "another"
    results = multipliers_of(table)
    assert results.costs == ["parameters", "bytes"]
    assert any("Seconds are not compared" in doubt for doubt in results.doubts)
    facts = as_dict(results)["candidates"][0]["budgets"][0]
    assert facts["by_cost"]["bytes"]["low"] == pytest.approx(1.5**0.5 / 4, rel=0.01)


def test_the_best_of_several_sizes_counts_and_one_at_the_edge_is_named():
    table = runs(np.random.default_rng(0), {"new": 1.5}, noise=0.0).assign(parameters=2e5)
    worse = [table.assign(parameters=n, loss=table["loss"] * 1.1) for n in (1e5, 4e5)]
    assert by_name(pd.concat((table, *worse)))["new"].mean.value == pytest.approx(1.5, rel=4e-3)
    doubts = multipliers_of(pd.concat((table, worse[0], worse[1].assign(parameters=5e4)))).doubts
    assert any(
        "(size) and 4 more: the setting in brackets is best at the edge" in d for d in doubts
    )


def test_a_loss_beyond_the_base_gives_a_bound_and_no_number():
    multipliers = multipliers_of(runs(np.random.default_rng(0), {"giant": 4.0}))
    top = multipliers.candidates[0].top
    assert top.multiplier.value == np.inf
    assert top.multiplier.low == pytest.approx(2.5)
    assert as_dict(multipliers)["candidates"][0]["budgets"][-1]["multiplier"]["value"] is None
    assert any("never has" in doubt for doubt in multipliers.doubts)


def test_equal_recipes_are_rarely_told_apart_and_the_doubts_name_what_is_not_tuned():
    table = runs(np.random.default_rng(0), {"same": 1.0})
    at_edge = table[(table["recipe"] != "same") | (table["learning_rate"] >= 0.01)]
    multipliers = multipliers_of(at_edge)
    assert multipliers.candidates[0].mean.includes_one
    assert not multipliers.candidates[0].is_winner
    assert any("fewer than three learning rates" in doubt for doubt in multipliers.doubts)


def test_a_diverged_run_brackets_the_rates_below_it():
    table = runs(np.random.default_rng(0), {"new": 1.2}, noise=0.0)
    table.loc[table["learning_rate"] == 0.02, "loss"] = np.inf
    assert all(c.is_bracketed for c in multipliers_of(table).cells)


def test_a_recipe_without_a_loss_is_named_and_wins_nothing_there():
    """`new` diverged at the highest budget, `never` at all; of `late` only the other seeds did."""
    table = runs(np.random.default_rng(0), {"new": 1.5, "never": 1.5, "late": 1.5})
    table["role"] = np.where(table["seed"] == 0, "rate", "seed")
    recipe, is_top = table["recipe"], table["flops"] == BUDGETS[-1]
    is_late = (recipe == "late") & (table["role"] == "seed")
    table.loc[((recipe == "new") | is_late) & is_top | (recipe == "never"), "loss"] = np.inf
    multipliers = multipliers_of(table)
    assert [c.name for c in multipliers.candidates if c.is_winner] == []
    assert {c.name: len(c.places) for c in multipliers.candidates} == {"new": 2, "late": 2}
    assert {
        "new has no loss at 1e+12 FLOPs: all 5 runs diverged.",
        "never has no loss at 1e+11 FLOPs: all 5 runs diverged.",
        "late has no loss at 1e+12 FLOPs: all 2 runs with other seeds diverged.",
    } <= set(multipliers.doubts)
    lost = as_dict(multipliers)["without_loss"]
    assert {"name": "new", "budget": BUDGETS[-1], "diverged": 5} in lost
    assert len(lost) == 5
    with pytest.raises(UserError, match=r"beside base with a loss; never has no loss at 1e\+11"):
        multipliers_of(table[recipe.isin(["base", "never"])])


def test_the_rate_with_most_seeds_counts_and_not_the_luckiest_run():
    table = runs(np.random.default_rng(0), {"new": 1.0}, noise=0.0)
    lucky = (table["recipe"] == "new") & (table["learning_rate"] == 0.02)
    table.loc[lucky, "loss"] *= 0.9
    assert by_name(table)["new"].mean.value == pytest.approx(1.0, abs=5e-3)


def test_a_sweep_that_was_lucky_at_its_edge_does_not_count_beside_its_seeds():
    table = runs(np.random.default_rng(0), {"new": 1.0}, noise=0.0)
    is_swept = table["seed"] == 0
    table["role"] = np.where(is_swept, "rate", "seed")
    table.loc[is_swept & (table["recipe"] == "new"), "loss"] *= 0.9
    multipliers = by_name(table)["new"]
    assert multipliers.mean.value == pytest.approx(1.0, abs=5e-3)
    assert {len(p.cell.logs) for p in multipliers.places} == {2}


def test_without_repeated_runs_nothing_is_shown():
    multipliers = multipliers_of(runs(np.random.default_rng(0), {"new": 1.4}, seeds=1))
    assert all(p.multiplier.includes_one for p in multipliers.candidates[0].places)
    assert any("so intervals, are unknown" in doubt for doubt in multipliers.doubts)


def test_a_budget_whose_seeds_scatter_far_more_is_named():
    rng = np.random.default_rng(0)
    table, loud = runs(rng, {"new": 1.2}, noise=0.001), runs(rng, {"new": 1.2}, noise=0.02)
    lowest = table["flops"] == BUDGETS[0]
    lines = multipliers_of(pd.concat((table[~lowest], loud[lowest]))).doubts
    assert any("At 1e+11 FLOPs runs scatter by" in doubt for doubt in lines)
    assert not any("scatter" in doubt for doubt in multipliers_of(table).doubts)


def test_fresh_seeds_confirm_a_winner_apart_from_the_runs_that_chose_it():
    rng = np.random.default_rng(0)
    table = runs(rng, {"new": 1.5})
    table["role"] = np.where(table["seed"] == 0, "rate", "seed")
    fresh = runs(rng, {"new": 1.1}).assign(role="confirm")
    is_top = (fresh["flops"] == BUDGETS[-1]) & (fresh["learning_rate"] == 0.01)
    top = by_name(pd.concat((table, fresh[is_top])))["new"].top
    assert top.multiplier.value == pytest.approx(1.5, rel=0.1)
    assert top.confirmed.value == pytest.approx(1.1, rel=0.1)


def test_a_recipe_that_won_by_the_bases_bad_luck_is_not_confirmed_by_it():
    """Nothing is better than the base, whose first seeds were unlucky at the highest budget."""
    rng = np.random.default_rng(0)
    table = runs(rng, {"new": 1.0}, noise=0.0005)
    table["role"] = np.where(table["seed"] == 0, "rate", "seed")
    is_top = (table["flops"] == BUDGETS[-1]) & (table["learning_rate"] == 0.01)
    table.loc[is_top & (table["recipe"] == "base"), "loss"] *= 1.02
    fresh = runs(rng, {"new": 1.0}, noise=0.0005)[is_top & (table["role"] == "seed")]
    multipliers = multipliers_of(pd.concat((table, fresh.assign(role="confirm"))))
    top = multipliers.candidates[0].top
    assert top.multiplier.low > 1
    assert top.confirmed.value == pytest.approx(1.0, abs=0.03)
    assert top.confirmed.low < 1
    alone = pd.concat((table, fresh[fresh["recipe"] == "new"].assign(role="confirm")))
    assert multipliers_of(alone).candidates[0].top.confirmed is None


@pytest.mark.parametrize(
    ("recipe", "loss", "doubt"),
    [
        ("base", law(9e12), "those of base have a loss outside of its curve"),
        ("base", np.inf, "a run of it or of base diverged"),
        ("new", np.inf, "a run of it or of base diverged"),
    ],
)
def test_fresh_seeds_without_an_answer_confirm_nothing(recipe, loss, doubt):
    """new needs three times less by its search, and less than all of the base by fresh seeds."""
    rng = np.random.default_rng(0)
    table = runs(rng, {"new": 3.0}, noise=0.0005)
    table["role"] = np.where(table["seed"] == 0, "rate", "seed")
    is_top = (table["flops"] == BUDGETS[-1]) & (table["role"] == "seed")
    fresh = runs(rng, {"new": 20.0}, noise=0.0005)[is_top].assign(role="confirm")
    one = multipliers_of(pd.concat((table, fresh))).candidates[0]
    assert one.is_winner
    assert one.top.confirmed_reach[1] == pytest.approx(2.5, rel=0.02)
    fresh.loc[fresh.index[fresh["recipe"] == recipe][:2], "loss"] = loss
    results = multipliers_of(pd.concat((table, fresh)))
    (one,) = results.candidates
    assert np.isnan(one.top.confirmed.value)
    assert not one.is_winner
    assert any(doubt in line for line in results.doubts)
    assert as_dict(results)["candidates"][0]["budgets"][-1]["confirmed"]["value"] is None
    assert _verdict(one, results).startswith("is not shown to differ from base at 1e+12 FLOPs, by")
    assert _cells(one.top.confirmed, one.top.confirmed_reach) == ["unknown", "unknown"]
    multipliers(results)


def test_seeds_that_diverged_beside_others_are_named():
    table = runs(np.random.default_rng(0), {"new": 1.5})
    table["role"] = np.where(table["seed"] == 0, "rate", "seed")
    assert not any("diverged" in line for line in multipliers_of(table).doubts)
    of_new = (table["recipe"] == "new") & (table["flops"] == BUDGETS[0])
    table.loc[of_new & (table["seed"] == 2), "loss"] = np.inf
    (line,) = (d for d in multipliers_of(table).doubts if "diverged" in d)
    assert line.startswith("Of new at 1e+11 some runs with other seeds diverged")


def test_a_comparison_without_a_base_or_with_other_data_is_refused():
    table = runs(np.random.default_rng(0), {"new": 1.2})
    with pytest.raises(UserError, match="reference=NAME, one of base, new"):
        multipliers_of(table, compose(StudyJob, ["input=[none]", "reference=gone"]))
    with pytest.raises(UserError, match="not comparable: tokenizer is a and b"):
        multipliers_of(table.assign(tokenizer=np.where(table["recipe"] == "new", "b", "a")))
    with pytest.raises(UserError, match="no curve"):
        multipliers_of(table[(table["recipe"] == "new") | (table["flops"] == BUDGETS[0])])


def test_a_csv_is_enough(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = runs(np.random.default_rng(0), {**TRUE, "gone": 1.2}).rename(
        columns={"flops": "compute"}
    )
    table.loc[table["recipe"] == "gone", "loss"] = np.inf
    table.to_csv("recipes.csv", index=False)
    fit = ["study", "fit", "recipes.csv", "columns={flops: compute}"]
    assert cli.main([*fit, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in facts["candidates"]] == ["good", "bad"]
    assert facts["candidates"][0]["multiplier"]["low"] > 1.2
    assert [lost["name"] for lost in facts["without_loss"]] == ["gone"] * 3
    assert cli.main(fit) == 0
    doubts = capsys.readouterr().out
    assert "good: needs less compute than base" in doubts
    assert "bad: needs more compute than base" in doubts
    assert "gone has no loss at 1e+12 FLOPs: all 5 runs diverged." in doubts
    assert cli.main(["study", "rates", *fit[2:]]) == 2
    assert "has several recipes" in capsys.readouterr().err


C = np.array([4e10, 1e11, 3.16e11, 1e12, 2.5e12])


def test_a_power_law_with_a_floor_is_inverted_between_its_budgets():
    targets = np.array([6e10, 2e11, 7e11, 2e12])
    curve = BaseCurve(np.log(C), np.log(law(C)))
    assert floor_of(np.log(C), np.log(law(C))) == pytest.approx(E, rel=0.03)
    assert np.exp(curve.log_compute(np.log(law(targets)))) == pytest.approx(targets, rel=2e-3)


def test_a_law_without_a_floor_is_inverted_too():
    losses = 2.2 * (C / 1e11) ** -0.07
    curve = BaseCurve(np.log(C), np.log(losses))
    assert np.exp(curve.log_compute(np.log([2.2 * 5**-0.07]))) == pytest.approx(5e11, rel=1e-6)


def test_nothing_is_extrapolated():
    curve = BaseCurve(np.log(C), np.log(law(C)))
    above, at_first, at_last, below = curve.log_compute(
        np.log([law(3.9e10), law(C[0]), law(C[-1]), law(2.6e12)])
    )
    assert (above, below) == (-np.inf, np.inf)
    assert [at_first, at_last] == pytest.approx([np.log(C[0]), np.log(C[-1])])


def test_budgets_out_of_order_give_one_compute_for_a_loss_all_the_same():
    losses = np.array([2.4, 2.2, 2.22, 2.0, 1.9])
    curve = BaseCurve(np.log(C), np.log(losses))
    multipliers = curve.log_compute(np.log(np.linspace(2.39, 1.91, 50)))
    assert np.isfinite(multipliers).all()
    assert (np.diff(multipliers) >= 0).all()


def test_drawn_curves_are_read_row_by_row():
    curve = BaseCurve(np.log(C), np.log(law(C)))
    nodes = np.log(law(C)) + np.array([[0.0], [0.01], [-0.01]])
    targets = np.log(law(np.array([2e11, 7e11]))) + np.zeros((3, 1))
    multipliers = curve.log_compute(targets, nodes)
    assert multipliers.shape == (3, 2)
    for row, cells in zip(multipliers, nodes, strict=True):
        alone = BaseCurve(np.log(C), cells)
        alone.floor = curve.floor
        assert row == pytest.approx(alone.log_compute(targets[0]))
