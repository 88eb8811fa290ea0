"""The two groups that are compared: tables, studies, and values of a column."""

import numpy as np
import pandas as pd
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.study import inputs
from forescale.scaling.study.inputs import read_groups


def rows(**columns) -> pd.DataFrame:
    """Six runs; columns of their own by `more`."""
    n = np.geomspace(1e6, 1e8, 6)
    return pd.DataFrame(
        {"parameters": n, "tokens": 20 * n, "loss": np.linspace(4, 3, 6), **columns}
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows().to_csv("old.csv", index=False)
    rows(parameters=np.geomspace(2e6, 2e8, 6)).to_csv("new.csv", index=False)
    kinds = ["c4", "c4", "web", "web", "code", "code"]
    rows(dataset=kinds, size=["s", "l"] * 3).to_csv("all.csv", index=False)
    return tmp_path


def test_two_tables_are_the_groups_in_their_order(folder):
    (one, a, where), (other, b, _) = read_groups(StudyJob(input=["old.csv", "new.csv"]))
    assert (one, other, where) == ("old", "new", "old.csv")
    assert b.parameters.tolist() == pytest.approx((2 * a.parameters).tolist())


def test_a_column_of_a_table_tells_its_groups_apart(folder):
    job = StudyJob(input=["all.csv"], by="dataset", groups=["web", "c4"])
    (one, a, where), (other, b, _) = read_groups(job)
    assert (one, other, where) == ("web", "c4", "all.csv, dataset=web")
    assert a.loss.tolist() == rows().loss[2:4].tolist()
    assert b.loss.tolist() == rows().loss[:2].tolist()


def test_rows_are_chosen_before_the_groups(folder):
    job = StudyJob(input=["all.csv"], by="dataset", groups=["c4", "web"], rows={"size": "l"})
    (_, a, _), (_, b, _) = read_groups(job)
    assert (a.loss.tolist(), b.loss.tolist()) == ([rows().loss[1]], [rows().loss[3]])


def test_the_only_two_values_of_a_column_need_no_names(folder):
    (one, a, _), (other, _, _) = read_groups(StudyJob(input=["all.csv"], by="size"))
    assert (one, other, len(a)) == ("s", "l", 3)


class FakeStudy:
    """A study whose cells are the rows of cells.csv in its directory."""

    def __init__(self, folder):
        self.folder = folder

    def table(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "cells.csv")


def test_studies_are_given_by_name_or_by_directory(folder, monkeypatch):
    monkeypatch.setattr(inputs, "Study", FakeStudy)
    for name, factor in (("one", 1), ("two", 2)):
        directory = folder / "studies" / name
        directory.mkdir(parents=True)
        (directory / "plan.json").write_text("{}")
        rows().assign(loss=factor * rows().loss).to_csv(directory / "cells.csv", index=False)
    (one, a, where), (other, b, _) = read_groups(StudyJob(input=["one", "studies/two"]))
    assert (one, other, where) == ("one", "studies/two", "6 cells of studies/one")
    assert b.loss.tolist() == pytest.approx((2 * a.loss).tolist())


def test_a_column_of_records_tells_runs_apart(folder, monkeypatch):
    """The input is runs, or the cells of the study."""
    records = rows(optimizer=["adamw", "muon"] * 3, schedule=["wsd", "cosine", "linear"] * 2)
    monkeypatch.setattr(inputs, "read", lambda job: (records, "6 runs"))
    (one, a, where), (other, b, _) = read_groups(StudyJob(input=["runs/*"], by="optimizer"))
    assert (one, other, where) == ("adamw", "muon", "6 runs, optimizer=adamw")
    assert (a.loss.tolist(), b.loss.tolist()) == (
        records.loss[::2].tolist(), records.loss[1::2].tolist()
    )  # fmt: skip
    with pytest.raises(UserError, match="6 runs: has 3 values of schedule"):
        read_groups(StudyJob(input=["runs/*"], by="schedule"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input": ["old.csv"]}, "study compare: has 1 inputs, not two; give two tables"),
        ({"input": ["old.csv", "new.csv"], "groups": ["a", "b"]}, "are given without a column"),
        ({"input": ["all.csv"], "by": "data"}, "has no column 'data'; the nearest are 'dataset'"),
        ({"input": ["all.csv"], "by": "dataset"}, "has 3 values of dataset: c4, web, code; name"),
        (
            {"input": ["all.csv"], "by": "dataset", "groups": ["c4", "wob"]},
            "no run has dataset=wob; use two of c4, web, code",
        ),
        (
            {"input": ["all.csv"], "by": "dataset", "groups": ["c4", "c4"]},
            "name two of them: groups=",
        ),
        ({"input": ["old.csv", "old.csv"]}, "old.csv: is given twice"),
        ({"input": ["old.csv", "no.csv"]}, "no.csv: doesn't exist"),
    ],
)
def test_what_gives_no_two_groups_is_refused_with_a_sentence(folder, keys, message):
    with pytest.raises(UserError) as refused:
        read_groups(StudyJob(**keys))
    assert message in str(refused.value)
