"""`forescale study`: its actions and their keys; fits of tables and of our own runs."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from forescale.config.schema import leaves
from forescale.scaling.actions import ACTIONS
from forescale.scaling.config import StudyJob
from tests.trainer.small_run import make_run

TRUTH = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}


def surface(noise=0.0, budgets=(1e18, 1e19, 1e20, 1e21), sizes=6):
    """IsoFLOP runs of a known law."""
    rng, rows = np.random.default_rng(1), []
    for c in budgets:
        best = 0.1 * c**0.5
        for n in best * np.geomspace(0.25, 4, sizes):
            d = c / (6 * n)
            loss = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
            loss *= np.exp(noise * rng.standard_normal())
            rows.append({"N": n, "tokens": d, "flops": c, "budget": c, "loss": loss})
    return pd.DataFrame(rows)


@pytest.fixture
def fit(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)

    def run(table, *arguments):
        table.to_csv("points.csv", index=False)
        columns = "columns={parameters: N}"
        return forescale("study", "fit", "points.csv", columns, "bootstraps=200", *arguments)

    return run


def test_a_fit_of_noiseless_runs_recovers_the_law(fit):
    code, out, _ = fit(surface(), "--json", "target.flops=1e22")
    facts = json.loads(out)
    assert code == 0
    assert facts["certificate"]["holds"]
    assert facts["values"] == pytest.approx(TRUTH, rel=1e-5)
    assert facts["prediction"]["extrapolation_factor"] == pytest.approx(10)
    n, d = facts["prediction"]["parameters"], facts["prediction"]["tokens"]
    assert 6 * n * d == pytest.approx(1e22)
    want = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
    assert facts["prediction"]["law"] == pytest.approx(want, rel=1e-8)
    assert facts["prediction"]["loss"] == pytest.approx(want, rel=0.02)
    assert facts["allocation"][0] == pytest.approx(0.37 / 0.72, rel=1e-5)


def test_the_output_has_the_law_its_uncertainty_and_its_doubts(fit):
    code, out, _ = fit(surface(0.01), "target.parameters=1e10", "target.tokens=2e11")
    assert code == 0
    assert re.search(r"^alpha +0\.\d+ +0\.\d+ +0\.\d+ +0\.\d+", out, re.MULTILINE)
    assert "Global optimum: yes" in out
    assert re.search(r"^D\* = .*, through the minima of 4 parabolas", out, re.MULTILINE)
    assert re.search(r"Answer\nLoss: [12]\.\d+\n90% interval: [12]\.", out)
    assert "Backtest: 1 prediction at 10 times the known compute was off by" in out
    assert "Compute: 1.2e22 FLOPs, 12 times the most expensive run" in out
    assert "Weights and widths come from the errors of 3 earlier forecasts" in out
    assert "Backtest, 5 to 12 times the compute, once: predictions by combined were off by" in out
    assert re.search(r"^3 +\d+ +10 to 10 +\d\.\d+%", out, re.MULTILINE), out
    assert re.search(r"Most influential runs\nrun .*\nrun \d", out), out


def test_a_target_that_is_too_far_is_refused(fit):
    code, out, err = fit(surface(), "target.flops=1e23")
    assert (code, out) == (2, "")
    assert "100 times the compute of the largest run" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.head(4), "4 different runs don't determine the 5 parameters"),
        (lambda t: t.assign(loss=-1.0), "is not a finite positive number"),
        (lambda t: t.drop(columns="loss"), "has no column 'loss'"),
    ],
)
def test_an_unusable_table_is_refused_with_a_sentence(fit, change, message):
    code, out, err = fit(change(surface()))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow  # seconds of bootstraps
def test_two_budgets_give_no_backtests(fit):
    code, out, _ = fit(surface(0.01, budgets=(1e18, 1e20)), "bootstraps=100")
    assert code == 0
    assert "No backtests: 2 budgets are too few" in out


def test_diverged_runs_are_left_out_with_a_note(fit):
    table = surface()
    table.loc[3, "loss"] = np.nan
    code, out, _ = fit(table)
    assert code == 0
    assert "1 diverged runs are left out: their loss is not finite." in out


def test_records_of_our_own_runs_can_be_fitted(small_data, tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        make_run(small_data, "runs", name)
    code, out, err = forescale("study", "records", "runs/*")
    assert (code, err) == (0, "")
    (tmp_path / "records.csv").write_text(out)
    table = pd.read_csv("records.csv")
    assert list(table["name"]) == ["a", "b"]
    assert {"parameters_blocks_and_head", "flops_causal", "tokens", "loss"} <= set(table.columns)
    err = forescale.refuses("study", "fit", "a", "b")
    assert "1 different runs don't determine the 5 parameters" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "study: needs an action"),
        (("fot", "x"), "is no action of a study"),
        (("status", "launch.at_once=2"), "the actions with this key are launch"),
        (
            ("score", "x.csv", "bootstraps=200"),
            "with this key are plan, next, fit, report, predict",
        ),
        (("fit", "x.csv", "--live"), "live: is no key of forescale study fit"),
        (("fit", "x.csv", "--", "a=1"), "study fit takes no arguments after it"),
        (("fit",), "input: names no runs"),
        (("fit", "nothing*"), "names no run"),
        (("fit", "."), "names no run"),
        (("fit", "a**"), "names no run"),
        (("fit", "a.csv", "b"), "mixes tables and runs"),
        (("fit", "x", "form=chinchila"), "form"),
    ],
)
def test_a_mistake_is_refused_with_a_sentence(tmp_path, monkeypatch, forescale, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in forescale.refuses("study", *arguments)


def test_the_help_of_a_study_lists_its_actions(forescale):
    out = forescale.prints("study", "--help")
    assert all(f"  {name} " in out for name in ACTIONS)
    assert "forescale study ACTION --help" in out
    assert "plan.cap" not in out


@pytest.mark.parametrize("name", ACTIONS)
def test_the_help_of_an_action_has_its_keys_alone(forescale, name):
    code, out, _ = forescale("study", name, "--help", "all")
    action = ACTIONS[name]
    assert code == 0
    assert action.purpose in out
    assert all(example in out for example in action.examples)
    keys = set(re.findall(r"^  ([a-z_][a-z_.]*) {2,}", out, re.MULTILINE))
    assert keys == {path for path in leaves(StudyJob) if action.reads(path)}


def test_every_key_is_read_by_an_action():
    for path in leaves(StudyJob):
        assert any(action.reads(path) for action in ACTIONS.values()), path
    for action in ACTIONS.values():
        for key in action.keys:
            assert any(path == key or key.endswith(".*") for path in leaves(StudyJob)), key


def test_a_forecast_is_written_and_scored(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    rows = surface(0.003).rename(columns={"N": "parameters"})
    rows = rows.assign(name=[f"cell-{i}" for i in rows.index])
    rows.to_csv("points.csv", index=False)
    words = ("points.csv", "study=mine")
    options = (*words, "bootstraps=100")
    run = (*options, "target.flops=3e21")
    out = forescale.prints("study", "predict", *run, "target.run=big")
    assert out.startswith("studies/mine/forecasts/0001.json: loss 2.")
    out = forescale.prints("study", "predict", *run, "study=b", "target.run=c", "--json")
    assert json.loads(out)["file"] == "studies/b/forecasts/0001.json"
    out = forescale.prints("study", "score", *words)
    assert "0 of 1 forecasts have an observed loss" in out
    assert "1 runs have no record yet." in out
    facts = json.loads((tmp_path / "studies/mine/forecasts/0001.json").read_text())
    run = {**facts["target"], "flops": 3e21, "budget": 3e21, "loss": facts["loss"] * 1.001}
    pd.concat([rows, pd.DataFrame([{**run, "name": "big"}])]).to_csv("points.csv", index=False)
    out = forescale.prints("study", "score", *words)
    assert "1 of 1 forecasts have an observed loss: 1 inside the interval, 1 inside the 50%" in out
    assert "+0.10%" in out
    assert json.loads(forescale("study", "score", *words, "--json")[1])["inside"] == 1
    assert forescale("study", "predict", *options, "target.flops=1e22")[0] == 2
    assert forescale("study", "score", "points.csv", "study=none")[0] == 2


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Two tables with five budgets, and one with three."""
    monkeypatch.chdir(tmp_path)
    five = np.geomspace(1e18, 1e20, 5)
    for name, noise, budgets in (("a", 0.003, five), ("b", 0.01, five), ("few", 0.003, five[:3])):
        table = surface(noise, budgets, 4).rename(columns={"N": "parameters"})
        table.to_csv(f"{name}.csv", index=False)


@pytest.mark.slow  # a law at every origin
def test_forecasts_are_judged_by_several_tables(tables, forescale):
    code, out, err = forescale("study", "backtest", "*.csv", "a.csv", "near=null")
    assert code == 0
    assert "Note: few.csv is left out: has 3 budgets with a finite loss, too few" in err
    assert "backtest: 20 fits" in err
    assert "Forecasts at every origin of 2 tables." in out
    assert re.search(r"^combined +4 +\d\.\d+% +[+-]\d\.\d+% +\d+% \d+%", out, re.MULTILINE)
    assert re.search(r"^law +2 .* [+-]\d+\.\d+ \(.* to .*\) +[+-]\d+\.\d+ +", out, re.MULTILINE)
    assert re.search(r"^last minimum +2 +\d+\.\d+% +\+\d+\.\d+% +\d+% \d+% +- ", out, re.MULTILINE)
    assert re.search(r"Combined, b\n.*\n2\.5 to 5 times +2 +\d\.\d+%", out)
    words = ("backtest", "a.csv", "near=null", "--json")
    code, out, _ = forescale("study", *words)
    facts = json.loads(out)["scores"]
    assert code == 0
    assert {one["table"] for one in facts} == {None, "a.csv"}
    assert {one["method"] for one in facts} == {"combined", "law", "line", "L(C)", "last minimum"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("few.csv",), "few.csv: has 3 budgets with a finite loss, too few for a backtest; give a"),
        (("few.csv", "no.csv"), "none of 2 tables can be judged; the first has 3 budgets"),
        (("a.csv", "runs"), "runs: is no table, as others of the input are; give tables alone"),
        (("a.csv", "form=auto"), "form: auto can't be judged; give one of chinchilla"),
        (("no.csv",), "no.csv: doesn't exist"),
        (("a.csv", "level=0.5"), "level: is no key of forescale study backtest"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_a_sentence(tables, forescale, arguments, message):
    err = forescale.refuses("study", "backtest", *arguments)
    assert message in err


@pytest.mark.slow  # draws a whole report
def test_a_report_is_one_file(fit, forescale, tmp_path):
    surface(0.003).to_csv("points.csv", index=False)
    words = ("points.csv", "columns={parameters: N}", "bootstraps=100", "study=mine")
    assert forescale.prints("study", "report", *words).startswith("studies/mine/report.html: ")
    assert "residuals-by-size" in (tmp_path / "studies/mine/report.html").read_text()
    assert forescale("study", "report", *words, "to=here.html")[0] == 0
    assert "/proc/a" in forescale.refuses("study", "report", *words, "to=/proc/a/b.html")
    (tmp_path / "folder.html").mkdir()
    assert "is a directory" in forescale.refuses("study", "report", *words, "to=folder.html")
    assert (tmp_path / "here.html").exists()
