"""The records of a study's page, read as a table: they give the numbers of the page again."""

import numpy as np
import pandas as pd

from forescale.scaling.analysis.multipliers import Multipliers, as_dict
from forescale.scaling.config import StudyJob
from forescale.scaling.report.evidence import evidence
from forescale.scaling.study.inputs import read
from tests.trainer.scaling import simulated_study
from tests.trainer.scaling.simulated_recipes import BUDGETS, runs


def test_a_law_is_fitted_to_the_runs_that_count(tmp_path):
    table = simulated_study.records()
    assert not table["fitted"].all()
    table.assign(folder="gone").to_csv(tmp_path / "records.csv", index=False)
    again, _ = read(StudyJob(input=[str(tmp_path / "records.csv")], cost="6nd"))
    expected, read_again = (evidence(simulated_study.job(), one) for one in (table, again))
    assert read_again.fitted["name"].tolist() == table["name"][table["fitted"]].tolist()
    assert read_again.noise == expected.noise
    assert "folder" not in again  # of runs on another machine
    assert again["device_hours"].tolist() == table["device_hours"].tolist()


def test_recipes_are_judged_by_the_same_runs(tmp_path):
    rng = np.random.default_rng(0)
    table = runs(rng, {"new": 1.5})
    table["role"] = np.where(table["seed"] == 0, "rate", "seed")
    is_top = (table["flops"] == BUDGETS[-1]) & (table["role"] == "seed")
    fresh = runs(rng, {"new": 1.1})[is_top].assign(role="confirm")
    table = pd.concat((table, fresh), ignore_index=True)
    table["edges"] = [("rate", "decay") if r == "seed" else () for r in table["role"]]
    table = table.assign(stage=1, cell_of="b1", batch=8, fitted=False, bytes=table["flops"] / 6e3)
    table = table.rename(columns={"flops": "flops_causal"}).assign(parameters_blocks_and_head=1e6)
    table["train_seconds"] = 1.0
    table.to_csv(tmp_path / "records.csv", index=False)
    job = StudyJob(input=[str(tmp_path / "records.csv")])
    again, where = read(job)
    expected = as_dict(Multipliers(table, job, where))
    assert expected["candidates"][0]["budgets"][-1]["confirmed"]["value"] is not None
    assert as_dict(Multipliers(again, job, where)) == expected


def test_columns_of_other_tables_say_nothing_of_roles(tmp_path):
    table = runs(np.random.default_rng(0), {"new": 1.5}).assign(role="confirm", fitted=0.5)
    table.to_csv(tmp_path / "others.csv", index=False)
    again, _ = read(StudyJob(input=[str(tmp_path / "others.csv")]))
    assert not {"role", "fitted"} & {*again}
