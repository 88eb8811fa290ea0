"""`forescale study`: the law of a table, and of our own runs, as a page and as JSON."""

import json
import re

import numpy as np
import pandas as pd
import pytest

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

    def run(table, *words):
        table.to_csv("points.csv", index=False)
        columns = "columns={parameters: N}"
        return forescale("study", "fit", "points.csv", columns, "bootstraps=200", *words)

    return run


def test_a_noiseless_table_gives_the_law_back(fit):
    code, out, _ = fit(surface(), "--json", "target.flops=1e22")
    found = json.loads(out)
    assert code == 0
    assert found["certificate"]["holds"]
    assert found["values"] == pytest.approx(TRUTH, rel=1e-5)
    assert found["foretold"]["beyond"] == pytest.approx(10)
    n, d = found["foretold"]["parameters"], found["foretold"]["tokens"]
    assert 6 * n * d == pytest.approx(1e22)
    assert found["foretold"]["loss"] == pytest.approx(
        TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"], rel=1e-8
    )
    assert found["allocation"][0] == pytest.approx(0.37 / 0.72, rel=1e-5)


def test_the_page_says_the_law_how_sure_it_is_and_what_is_doubtful(fit):
    code, out, _ = fit(surface(0.01), "target.parameters=1e10", "target.tokens=2e11")
    assert code == 0
    assert re.search(r"^alpha +0\.\d+ +0\.\d+ +0\.\d+ +0\.\d+", out, re.MULTILINE)
    assert "certified: scaled gradient" in out
    assert "IsoFLOP parabolas: 4 budgets; D* = " in out
    assert re.search(r"Foretold N 1e\+10, D 2e\+11, 12 times .*: loss 2\.\d+; 50% 2\.", out)
    assert "a decade, prior only; resampling alone would say" in out, "of a single roll-out"
    assert re.search(r"^ +3 +\d+ +10 to 10 x +\d\.\d+%", out, re.MULTILINE), out
    assert "Runs that move the law most: run " in out


def test_a_target_that_is_too_far_is_refused(fit):
    code, out, err = fit(surface(), "target.flops=1e23")
    assert (code, out) == (2, "")
    assert "100 times beyond the largest run" in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.head(4), "4 different runs can't tell the 5 parameters"),
        (lambda t: t.assign(loss=-1.0), "which has no logarithm"),
        (lambda t: t.drop(columns="loss"), "has no column 'loss'"),
    ],
)
def test_a_table_that_tells_nothing_is_a_sentence(fit, change, said):
    code, out, err = fit(change(surface()))
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_two_budgets_are_told_what_they_lack(fit):
    code, out, _ = fit(surface(0.01, budgets=(1e18, 1e20)), "bootstraps=100")
    assert code == 0
    assert "No roll-outs: 2 budgets can't be parted" in out


def test_diverged_runs_are_left_out_and_said(fit):
    table = surface()
    table.loc[3, "loss"] = np.nan
    code, out, _ = fit(table)
    assert code == 0
    assert "Note: 1 runs whose loss is no number are left out (diverged)." in out


def test_parabolas_that_say_nothing_are_refused_by_budget(fit):
    table = surface()
    edge = table["budget"] == 1e18
    least = table.loc[edge, "loss"].min()
    table.loc[edge, "loss"] = least + np.arange(edge.sum()) * 0.01  # it only falls
    assert "refused 1e+18 FLOPs: " in fit(table, "bootstraps=100")[1]


def test_records_of_our_own_runs_are_a_table_that_a_fit_takes(
    small_data, tmp_path, monkeypatch, forescale
):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        make_run(small_data, "runs", name)
    code, out, err = forescale("study", "records", "runs/*")
    assert (code, err) == (0, "")
    (tmp_path / "records.csv").write_text(out)
    table = pd.read_csv("records.csv")
    assert list(table["name"]) == ["a", "b"]
    assert {"parameters_blocks_and_head", "flops_causal", "tokens", "loss"} <= set(table.columns)
    code, _, err = forescale("study", "fit", "a", "b")
    assert code == 2
    assert "1 different runs can't tell the 5 parameters" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "is nothing that a study does"),
        (("fot", "x"), "is nothing that a study does"),
        (("fit",), "input: names no runs"),
        (("fit", "nothing*"), "names no run"),
        (("fit", "a.csv", "b"), "mixes tables and runs"),
        (("fit", "x", "form=chinchila"), "form"),
    ],
)
def test_a_mistake_is_a_sentence(tmp_path, monkeypatch, forescale, words, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = forescale("study", *words)
    assert code == 2
    assert said in err


def test_a_forecast_is_written_and_scored(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    rows = surface(0.003).rename(columns={"N": "parameters"})
    rows = rows.assign(name=[f"cell-{i}" for i in rows.index])
    rows.to_csv("points.csv", index=False)
    words = ("points.csv", "bootstraps=100", "study=mine")
    code, out, _ = forescale("study", "predict", *words, "target.run=big", "target.flops=3e21")
    assert code == 0
    assert out.startswith("studies/mine/forecasts/0001.json: loss 2.")
    code, out, _ = forescale("study", "score", *words)
    assert "0 of 1 came out" in out
    assert "1 abandoned so far. The chain of cards is whole." in out
    card = json.loads((tmp_path / "studies/mine/forecasts/0001.json").read_text())
    made = {**card["target"], "flops": 3e21, "budget": 3e21, "loss": card["loss"] * 1.001}
    pd.concat([rows, pd.DataFrame([{**made, "name": "big"}])]).to_csv("points.csv", index=False)
    code, out, _ = forescale("study", "score", *words)
    assert code == 0
    assert "1 of 1 came out: 1 inside of the interval, 1 of the 50% one" in out
    assert "-0.10%" in out
    assert json.loads(forescale("study", "score", *words, "--json")[1])["inside"] == 1
    assert forescale("study", "predict", *words, "target.flops=1e22")[0] == 2
    assert forescale("study", "score", "points.csv", "study=none")[0] == 2


def test_a_report_is_one_file(fit, forescale, tmp_path):
    surface(0.003).to_csv("points.csv", index=False)
    words = ("points.csv", "columns={parameters: N}", "bootstraps=100", "study=mine")
    code, out, _ = forescale("study", "report", *words)
    assert code == 0
    assert out.startswith("studies/mine/report.html: ")
    assert (tmp_path / "studies/mine/report.html").stat().st_size > 1_000_000, "plotly is inside"
    assert forescale("study", "report", *words, "to=here.html")[0] == 0
    assert (tmp_path / "here.html").exists()
