"""Forecasts: written only before the run, hash-chained against changes, and scored."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from forescale.config.compose import compose
from forescale.ground.errors import UserError
from forescale.run.directory import Run
from forescale.scaling.analysis.forecast import (
    GENESIS,
    curve_facts,
    read_forecasts,
    score,
    write_forecast,
)
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.report.study_sections import forecast_section
from tests.trainer.scaling.iso_flop_runs import TRUTH, iso_flop_table

BUDGETS = (1e18, 1e19, 1e20, 1e21)


def loss_of(n, d):
    return float(CHINCHILLA.predict(TRUTH, parameters=n, tokens=d)[0])


def table(noise=0.004):
    runs = iso_flop_table(BUDGETS, sizes=5, width=2.5, noise=noise, seed=2)
    return runs.assign(name=[f"cell-{i}" for i in runs.index])


def study(*arguments, rows=None):
    job = compose(StudyJob, ["input=[x]", "bootstraps=100", *arguments])
    return StudyFit(table() if rows is None else rows, job, "x")


@pytest.fixture(scope="module")
def by_combination():
    return study()


@pytest.fixture(scope="module")
def two_forecasts(by_combination, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "forecasts"
    for name, c in (("big", 3e21), ("bigger", 1e22)):
        write_forecast(by_combination, path, name, TargetPoint(flops=c))
    return path


@pytest.fixture
def folder(two_forecasts, tmp_path):
    """Two forecasts of runs without a record."""
    return Path(shutil.copytree(two_forecasts, tmp_path / "forecasts"))


def test_a_forecast_holds_target_intervals_rivals_hashes_and_time(folder):
    first, second = read_forecasts(folder)
    f = first.facts
    assert f["target"]["run"] == "big"
    assert 6 * f["target"]["parameters"] * f["target"]["tokens"] == pytest.approx(3e21, rel=1e-3)
    (least, most), (low, high) = f["interval"], f["interval_50"]
    assert least < low < f["loss"] < high < most
    assert f["rivals"].keys() == {"line", "L(C)", "law alone"}
    assert f["method"] == "combined"
    assert f["previous_hash"] == GENESIS
    assert second.facts["previous_hash"] == f["hash"]
    assert len(f["data"]) == 64
    assert f["time"].endswith("Z")


def test_a_run_with_a_record_or_a_forecast_is_refused(by_combination, folder):
    with pytest.raises(UserError, match="cell-3: has a record already"):
        write_forecast(by_combination, folder, "cell-3", TargetPoint(flops=3e21))
    n, d = (float(table()[name][7]) for name in ("parameters", "tokens"))
    with pytest.raises(UserError, match="has a record already, so it can't be predicted"):
        write_forecast(by_combination, folder, "another", TargetPoint(parameters=n, tokens=d))
    with pytest.raises(UserError, match="big: has a forecast already"):
        write_forecast(by_combination, folder, "big", TargetPoint(flops=5e21))
    with pytest.raises(UserError, match="target: is not given"):
        write_forecast(by_combination, folder, "other")
    assert len(read_forecasts(folder)) == 2


def test_a_forecast_has_an_interval_for_its_end_and_for_each_branch(by_combination, tmp_path):
    aim = TargetPoint(parameters=1.5e9, tokens=4e11, branches=[1e11, 2e11])
    facts = write_forecast(by_combination, tmp_path, "big", aim).facts
    whole, first, second = read_forecasts(tmp_path)[0].intervals
    assert (whole.tokens, first.tokens, second.tokens) == (4e11, 1e11, 2e11)
    assert (whole.loss, *whole.outer) == (facts["loss"], *facts["interval"])
    assert whole.loss < second.loss < first.loss
    assert first.loss == pytest.approx(loss_of(1.5e9, 1e11), rel=0.02)
    (alone,) = write_forecast(
        by_combination, tmp_path, "b", TargetPoint(parameters=1.5e9, tokens=1e11)
    ).intervals
    assert (alone.loss, alone.outer, alone.inner) == (first.loss, first.outer, first.inner)


def test_a_branch_must_be_shorter_than_its_run_and_without_a_record(by_combination, tmp_path):
    for tokens in (4e11, 3.99e11, 5e11, 0.0):
        aim = TargetPoint(parameters=1.5e9, tokens=4e11, branches=[1e11, tokens])
        with pytest.raises(
            UserError, match=r"target\.branches: .* is not shorter than its run of 4e\+11"
        ):
            write_forecast(by_combination, tmp_path, "big", aim)
    n, d = (float(table().iloc[-1][name]) for name in ("parameters", "tokens"))
    with pytest.raises(UserError, match="has a record already, so it can't be predicted"):
        write_forecast(
            by_combination, tmp_path, "big", TargetPoint(parameters=n, tokens=3 * d, branches=[d])
        )
    assert read_forecasts(tmp_path) == []


def test_a_law_of_flops_alone_makes_forecasts_without_intervals(tmp_path):
    by_flops = study("form=frontier", rows=table().drop(columns="budget"))
    with pytest.raises(UserError, match="is not shorter than its run of nan"):
        write_forecast(by_flops, tmp_path, "big", TargetPoint(flops=3e21, branches=[1e11]))
    forecast = write_forecast(by_flops, tmp_path, "big", TargetPoint(flops=3e21))
    assert (forecast.facts["points"], read_forecasts(tmp_path)[0].intervals) == ([], [])


def test_a_score_counts_observed_and_abandoned_forecasts(folder):
    first = read_forecasts(folder)[0].facts["target"]
    observed = loss_of(first["parameters"], first["tokens"])
    result = score(read_forecasts(folder), pd.DataFrame([{"name": "big", "loss": observed}]))
    assert result.abandoned == ["0002"]
    assert result.inside == 1
    assert abs(result.errors["0001"]) < 0.02
    low, high = read_forecasts(folder)[0].facts["interval"]
    assert result.interval_score == pytest.approx(high - low), "inside: the width alone"
    assert result.skill["line"] > 0, "a straight line has no irreducible loss"
    assert "law alone" in result.skill


def test_an_outcome_is_written_once_and_later_tables_do_not_change_it(folder):
    score(read_forecasts(folder), pd.DataFrame([{"name": "big", "loss": 2.5}]))
    again = score(read_forecasts(folder), pd.DataFrame([{"name": "big", "loss": 9.9}]))
    assert read_forecasts(folder)[0].outcome["loss"] == 2.5
    assert again.errors["0001"] == pytest.approx(
        math.log(read_forecasts(folder)[0].facts["loss"] / 2.5)
    )


def test_a_miss_adds_its_distance_to_the_interval_score(folder):
    forecast = read_forecasts(folder)[0]
    low, high = forecast.facts["interval"]
    result = score([forecast], pd.DataFrame([{"name": "big", "loss": high + 0.1}]))
    assert result.inside == 0
    assert result.interval_score == pytest.approx(high - low + 0.1 * 2 / 0.1)


def test_two_budgets_give_no_backtests_and_fewer_rivals(tmp_path):
    rows = table()
    rows = rows[rows.budget < 5e19]
    facts = write_forecast(study("target.flops=1e20", rows=rows), tmp_path / "f", "big").facts
    assert facts["backtests"] == 0
    assert "L(C)" not in facts["rivals"]
    assert "line" in facts["rivals"]


@pytest.mark.slow  # two bootstraps
def test_the_interval_resamples_trunks_if_the_job_asks_for_clusters():
    """Branches of a trunk share its error."""
    rows = table(noise=0.0)
    rng = np.random.default_rng(5)
    rows["trunk"] = np.repeat(np.arange(len(rows) // 2), 2)
    rows["loss"] *= np.exp(0.01 * rng.standard_normal(len(rows) // 2))[rows["trunk"]]
    arguments = (
        ("method=law", "target.flops=3e21", f"resample={how}") for how in ("pairs", "clusters")
    )
    both = [study(*each, rows=rows) for each in arguments]
    pairs, clusters = (np.log(one.predict().outer) for one in both)
    assert both[1].calibrated.replicates is both[1].replicates
    assert not np.allclose(pairs, clusters)


@pytest.fixture
def finished_runs(tmp_path):
    """A table of runs of ours with their rows: 16 sizes and lengths, of a law with a decay."""
    rows = table(noise=0.0).to_dict("records")
    for row in rows:
        attempt = Run(tmp_path / "runs" / row["name"]).new_attempt()
        for step in range(1, 101):
            loss = row["loss"] + 0.5 * (1 - step / 100)
            attempt.metrics.add({"kind": "train", "step": step, "loss": loss})
        Run(tmp_path / "runs" / row["name"]).metrics.symlink_to(attempt.metrics.path)
        row |= {"folder": str(tmp_path / "runs" / row["name"]), "steps": 100, "schedule": "wsd"}
        row |= {
            "decay_steps": 20,
            "warmup_steps": 2,
            "parameters_blocks_and_head": row["parameters"],
        }
    return pd.DataFrame(rows)


def test_a_forecast_of_runs_with_rows_has_their_curve(finished_runs, tmp_path):
    law = study(rows=finished_runs)
    facts = write_forecast(law, tmp_path / "f", "big", TargetPoint(flops=3e21)).facts
    curve = facts["points"][0]["curve"]
    assert (curve["schedule"], curve["decay"], curve["runs"]) == ("wsd", 0.2, 20)
    assert curve["above"][0] == pytest.approx(np.log(1 + 0.45 / facts["loss"]), rel=0.1)
    assert abs(curve["above"][-1]) < 0.003
    other = finished_runs.assign(schedule=["wsd"] * 2 + ["cosine"] * 18)
    assert curve_facts(study(rows=other), 1e10, 1e11)["curve"]["runs"] == 18
    assert curve_facts(study(rows=finished_runs.drop(columns="folder")), 1e10, 1e11) == {}


def test_a_score_counts_the_forecasts_that_a_run_made_of_its_own_end(folder, tmp_path):
    forecast = read_forecasts(folder)[0]
    attempt = Run(tmp_path / "big").new_attempt()
    event = {"above": 0.0, "inside": 0.9, "level": 0.9, "hash": forecast.facts["hash"]}
    ends = {"loss": 2.02, "low": 1.9, "high": 2.1}
    attempt.event("forecast_anew", step=5, share=0.5, **event, **ends | {"loss": 9.0})  # repeated
    attempt.event("forecast_anew", step=5, share=0.5, **event, **ends)
    attempt.event("forecast_anew", step=9, share=0.9, **event, **ends | {"high": 1.95})
    attempt.event("forecast_anew", step=9, share=0.9, **{**event, "hash": "of another"}, **ends)
    observed = pd.DataFrame([{"name": "big", "loss": 2.0, "folder": str(tmp_path / "big")}])
    scored = score(read_forecasts(folder), observed)
    assert scored.anew == [(0.5, math.log(1.01), 1), (0.9, math.log(1.01), 0)]
    text = "".join(map(str, forecast_section(read_forecasts(folder), scored).after))
    assert "At 2 checkpoints the runs forecast their own ends anew" in text
    assert "&lt;" not in text
    assert "<data" in text, "a number that the terminal rounds, and the page copies"
    assert "1 inside their 90% interval" in text
