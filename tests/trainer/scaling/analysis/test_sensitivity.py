"""How the law depends on the conventions of N and C."""

import json

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.analysis.sensitivity import conventions
from forescale.scaling.analysis.table_fit import StudyFit, as_dict
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.report.fit_sections import sensitivity_section, terminal_sections

LAW = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}


def records(noise=0.0) -> pd.DataFrame:
    """Runs of a law in `total` N. Embedding tables are a large part of small models, and so is the
    additional cost of the causal C."""
    rng, rows = np.random.default_rng(0), []
    for c in np.geomspace(1e15, 1e19, 5):
        for total in 0.1 * c**0.5 * np.geomspace(0.4, 2.5, 5):
            table = 3e4 * total**0.33
            d = c / 6 / total
            loss = CHINCHILLA.predict(LAW, parameters=total, tokens=d)[0]
            rows.append({
                "parameters_total": total, "parameters_active": total,
                "parameters_non_embedding": total - 0.5 * total**0.9,
                "flops_6nd": c, "flops_causal": 6 * d * (total + table),
                "tokens": d, "loss": loss * np.exp(noise * rng.standard_normal()),
            })  # fmt: skip
    return pd.DataFrame(rows)


def study(rows: pd.DataFrame, **keys) -> StudyFit:
    settings = {"size": "total", "cost": "6nd", "bootstraps": 100, "sensitivity": True} | keys
    return StudyFit(rows, StudyJob(input=["x"], **settings), "x")


@pytest.fixture(scope="module")
def noiseless() -> StudyFit:
    return study(records())


def test_there_is_one_row_per_distinct_pair_of_conventions(noiseless):
    rows = noiseless.sensitivity
    assert [(r.size, r.cost) for r in rows] == [
        ("total, active", "6nd"), ("total, active", "causal"),
        ("non_embedding", "6nd"), ("non_embedding", "causal"),
    ]  # fmt: skip


def test_the_allocation_depends_on_the_compute_exponent(noiseless):
    """With C = 6 N D it is that of the law; otherwise it agrees with the minimum on a fine grid
    along the budget."""
    first, causal = noiseless.sensitivity[:2]
    assert first.compute_exponent == pytest.approx(1)
    assert first.allocation == pytest.approx(noiseless.allocation[0], rel=1e-8)
    assert first.allocation == pytest.approx(0.37 / 0.72, rel=1e-5)
    assert causal.compute_exponent < 1
    n = np.geomspace(1e5, 1e9, 400_001)
    best = [
        n[CHINCHILLA.predict(LAW, parameters=n, tokens=c / n**causal.compute_exponent).argmin()]
        for c in (1e12, 1e13)
    ]
    assert causal.allocation == pytest.approx(np.log10(best[1] / best[0]), abs=1e-3)
    assert causal.values == first.values, "the law doesn't read C"


def test_another_convention_of_n_gives_another_law():
    rows = {(r.size, r.cost): r for r in study(records(0.002)).sensitivity}
    total, other = rows["total, active", "6nd"], rows["non_embedding", "6nd"]
    assert abs(other.values["alpha"] - total.values["alpha"]) > 0.001
    for row in rows.values():
        low, high = row.interval
        assert low < row.allocation < high


def test_the_target_is_one_run_in_all_rows(noiseless):
    """Its N and C are converted, so that without noise all laws predict nearly the same loss."""
    fitted = study(records(), target=TargetPoint(parameters=1e9, tokens=1e10))
    losses = [row.loss for row in fitted.sensitivity]
    assert losses[0] == pytest.approx(fitted.predict().law, rel=1e-8)
    assert losses == pytest.approx([losses[0]] * 4, rel=0.002)
    unconverted = CHINCHILLA.predict(fitted.sensitivity[2].values, parameters=1e9, tokens=1e10)[0]
    assert abs(unconverted / losses[0] - 1) > 0.002, "with N not converted"
    assert [row.loss for row in noiseless.sensitivity] == [None] * 4


def test_a_law_of_compute_is_fitted_to_each_convention_of_c():
    rows = study(records(), form="frontier", target=TargetPoint(flops=1e20)).sensitivity
    assert [row.allocation for row in rows] == [None] * 4
    assert rows[0].values["gamma"] != rows[1].values["gamma"]


def test_sensitivity_is_shown_and_in_the_json(noiseless):
    rows = sensitivity_section(noiseless).rows
    assert [row[0] for row in rows[1:]] == ["total, active"] * 2 + ["non_embedding"] * 2
    assert len(json.loads(json.dumps(as_dict(noiseless)))["sensitivity"]) == 4
    silent = study(records(0.002), sensitivity=False)
    assert silent.sensitivity is None
    printed = [[s.name for s in terminal_sections(fitted)] for fitted in (noiseless, silent)]
    assert ["sensitivity" in names for names in printed] == [True, False]


def test_a_table_with_one_convention_has_one_row():
    rows = records().rename(columns={"parameters_total": "parameters", "flops_6nd": "flops"})
    fitted = study(rows[["parameters", "flops", "tokens", "loss"]])
    assert len(fitted.sensitivity) == 1
    assert "nothing to compare" in sensitivity_section(fitted).absent
    assert len(study(rows[["parameters", "tokens", "loss"]]).sensitivity) == 1


def test_a_convention_that_some_runs_lack_is_left_out():
    rows = records()
    rows.loc[3, "parameters_active"] = np.nan
    assert list(conventions(rows, "parameters")) == ["total", "non_embedding"]
