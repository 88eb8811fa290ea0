"""Forecast cards: written before, never after; a chain that shows every hand laid on it; scored."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from forescale.config.compose import compose
from forescale.errors import UserError
from forescale.scaling.analysis.answer import StudyFit
from forescale.scaling.analysis.forecast import GENESIS, cards, predict, score
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.laws import CHINCHILLA

TRUTH = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}
BUDGETS = (1e18, 1e19, 1e20, 1e21)


def loss_of(n, d):
    return float(CHINCHILLA.predict(TRUTH, parameters=n, tokens=d)[0])


def table(noise=0.004):
    rng, rows = np.random.default_rng(2), []
    for c in BUDGETS:
        for n in 0.1 * c**0.5 * np.geomspace(0.4, 2.5, 5):
            d = c / (6 * n)
            loss = loss_of(n, d) * np.exp(noise * rng.standard_normal())
            rows.append({"parameters": n, "tokens": d, "flops": c, "budget": c, "loss": loss})
    made = pd.DataFrame(rows)
    return made.assign(name=[f"cell-{i}" for i in made.index])


def study(*words, rows=None):
    job = compose(StudyJob, ["input=[x]", "bootstraps=100", *words])
    return StudyFit(table() if rows is None else rows, job, "x")


@pytest.fixture(scope="module")
def made():
    return study()


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "forecasts"
    for name, c in (("big", 3e21), ("bigger", 1e22)):
        predict(made, path, name, TargetPoint(flops=c))
    return path


@pytest.fixture
def folder(written, tmp_path):
    """Two cards, of runs that nobody has made."""
    return Path(shutil.copytree(written, tmp_path / "forecasts"))


def test_a_card_says_what_was_foretold_by_what_and_when(folder):
    first, second = cards(folder)
    f = first.facts
    assert f["target"]["run"] == "big"
    assert 6 * f["target"]["parameters"] * f["target"]["tokens"] == pytest.approx(3e21, rel=1e-3)
    (least, most), (low, high) = f["interval"], f["interval_50"]
    assert least < low < f["loss"] < high < most
    assert f["rivals"].keys() == {"line", "L(C)", "without discrepancy"}
    assert f["before"] == GENESIS
    assert second.facts["before"] == f["hash"]
    assert len(f["data"]) == 64
    assert f["time"].endswith("Z")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("harm", ["loss", "interval", "time", "remove", "swap"])
def test_a_hand_laid_on_the_cards_is_found(folder, harm):
    first, second = folder / "0001.json", folder / "0002.json"
    if harm == "remove":
        first.unlink()
    elif harm == "swap":
        text = first.read_text()
        first.write_text(second.read_text())
        second.write_text(text)
    else:
        change(first, **{harm: [0, 9] if harm == "interval" else 1.0})
    with pytest.raises(UserError, match=r"card 0001 is missing|was changed after it was written"):
        cards(folder)


def test_a_card_that_was_made_anew_with_its_hash_breaks_the_next_one(folder):
    from forescale.scaling.analysis.forecast import hash_of

    path = folder / "0001.json"
    facts = {**json.loads(path.read_text()), "loss": 1.0}
    path.write_text(json.dumps({**facts, "hash": hash_of(facts)}))
    with pytest.raises(UserError, match=r"0002\.json: was changed"):
        cards(folder)


def test_what_is_known_is_not_foretold(made, folder):
    with pytest.raises(UserError, match="cell-3: has a record already"):
        predict(made, folder, "cell-3", TargetPoint(flops=3e21))
    n, d = (float(table()[name][7]) for name in ("parameters", "tokens"))
    with pytest.raises(UserError, match="what is known can't be foretold"):
        predict(made, folder, "another", TargetPoint(parameters=n, tokens=d))
    with pytest.raises(UserError, match="big: has a card already"):
        predict(made, folder, "big", TargetPoint(flops=5e21))
    with pytest.raises(UserError, match="target: is not given"):
        predict(made, folder, "other")
    assert len(cards(folder)) == 2


def test_a_card_has_a_band_for_its_end_and_for_each_branch(made, tmp_path):
    aim = TargetPoint(parameters=1.5e9, tokens=4e11, branches=[1e11, 2e11])
    facts = predict(made, tmp_path, "big", aim).facts
    whole, first, second = cards(tmp_path)[0].bands
    assert (whole.tokens, first.tokens, second.tokens) == (4e11, 1e11, 2e11)
    assert (whole.loss, *whole.outer) == (facts["loss"], *facts["interval"])
    assert whole.loss < second.loss < first.loss
    assert first.loss == pytest.approx(loss_of(1.5e9, 1e11), rel=0.02)
    (alone,) = predict(made, tmp_path, "b", TargetPoint(parameters=1.5e9, tokens=1e11)).bands
    assert (alone.loss, alone.outer, alone.inner) == (first.loss, first.outer, first.inner)


def test_a_branch_is_shorter_than_its_run_and_not_known(made, tmp_path):
    for tokens in (4e11, 3.99e11, 5e11, 0.0):
        aim = TargetPoint(parameters=1.5e9, tokens=4e11, branches=[1e11, tokens])
        with pytest.raises(UserError, match=r"target\.branches: .* no branch of a run of 4e\+11"):
            predict(made, tmp_path, "big", aim)
    n, d = (float(table().iloc[-1][name]) for name in ("parameters", "tokens"))
    with pytest.raises(UserError, match="what is known can't be foretold"):
        predict(made, tmp_path, "big", TargetPoint(parameters=n, tokens=3 * d, branches=[d]))
    assert cards(tmp_path) == []


def test_a_law_of_flops_alone_makes_cards_without_bands(tmp_path):
    by_flops = study("form=frontier", rows=table().drop(columns="budget"))
    with pytest.raises(UserError, match="no branch of a run of nan"):
        predict(by_flops, tmp_path, "big", TargetPoint(flops=3e21, branches=[1e11]))
    card = predict(by_flops, tmp_path, "big", TargetPoint(flops=3e21))
    assert (card.facts["bands"], cards(tmp_path)[0].bands) == ([], [])


def test_a_score_counts_what_came_out_and_what_never_did(folder):
    first = cards(folder)[0].facts["target"]
    came = loss_of(first["parameters"], first["tokens"])
    made = score(cards(folder), pd.DataFrame([{"name": "big", "loss": came}]))
    assert made.abandoned == ["0002"]
    assert made.inside == 1
    assert abs(made.errors["0001"]) < 0.02
    low, high = cards(folder)[0].facts["interval"]
    assert made.interval_score == pytest.approx(high - low), "inside: the width alone"
    assert made.skill["line"] > 0, "a straight line misses the floor of the loss"
    assert made.skill["without discrepancy"] == 0, "the same value, another interval"


def test_an_outcome_is_written_once_and_outlives_the_table(folder):
    score(cards(folder), pd.DataFrame([{"name": "big", "loss": 2.5}]))
    again = score(cards(folder), pd.DataFrame([{"name": "big", "loss": 9.9}]))
    assert cards(folder)[0].outcome["loss"] == 2.5
    assert again.errors["0001"] == pytest.approx(math.log(cards(folder)[0].facts["loss"] / 2.5))


def test_a_miss_costs_by_how_far(folder):
    card = cards(folder)[0]
    low, high = card.facts["interval"]
    made = score([card], pd.DataFrame([{"name": "big", "loss": high + 0.1}]))
    assert made.inside == 0
    assert made.interval_score == pytest.approx(high - low + 0.1 * 2 / 0.1)


def test_a_study_without_a_third_budget_has_fewer_rivals(tmp_path):
    rows = table()
    rows = rows[rows.budget < 5e19]
    facts = predict(study("target.flops=1e20", rows=rows), tmp_path / "f", "big").facts
    assert facts["roll_outs"] == 0
    assert "L(C)" not in facts["rivals"]
    assert "line" in facts["rivals"]


@pytest.mark.slow
def test_runs_of_one_trunk_are_one_observation():
    """The interval resamples as it is told: branches of a trunk share what was off about it."""
    rows = table(noise=0.0)
    rng = np.random.default_rng(5)
    rows["trunk"] = np.repeat(np.arange(len(rows) // 2), 2)
    rows["loss"] *= np.exp(0.01 * rng.standard_normal(len(rows) // 2))[rows["trunk"]]
    words = (("target.flops=3e21", f"resample={how}") for how in ("pairs", "clusters"))
    both = [study(*each, rows=rows) for each in words]
    pairs, clusters = (np.log(made.foretold().outer) for made in both)
    assert both[1].sure.replicates is both[1].replicates
    assert not np.allclose(pairs, clusters)
