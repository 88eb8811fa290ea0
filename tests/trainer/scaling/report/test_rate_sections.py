"""Learning rate and batch in the answer of a study."""

import re

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import TargetPoint
from forescale.scaling.report.fit_sections import answer
from forescale.scaling.study.inputs import read
from tests.trainer.scaling.simulated_study import BEND, BEST, job, records


def rows_of(table: pd.DataFrame) -> dict[str, str]:
    law = StudyFit(table, job(target=TargetPoint(flops=1e21)), "x")
    rows = answer(law, law.predict()).rows
    return {str(name): re.sub("<[^>]*>", "", str(text)) for name, text in rows}


@pytest.fixture
def table():
    return records().assign(batch_tokens=lambda t: t["batch"] * 256.0)


def test_the_answer_has_the_best_rate_of_the_target_and_what_twice_as_much_costs(table):
    rows = rows_of(table)
    assert rows["Learning rate"] == f"{BEST:g} (90%: {BEST:g} to {BEST:g})"
    assert rows["Twice that rate"] == f"+{100 * np.expm1(BEND * np.log(2) ** 2):.2f}% of the loss"
    assert rows["Critical batch"].startswith("not determined: no three batches had three")


def test_what_the_sweeps_do_not_determine_is_said_and_a_bare_table_has_no_such_row(table):
    grid = table["role"] == "grid"
    assert rows_of(table[grid])["Learning rate"] == "not determined: no size was swept"
    one = rows_of(table[grid | (table["cell_of"] == "s2-n0")])
    assert one["Learning rate"] == "not determined: one size was swept"
    pilot = table[(table["cell_of"] == "s1-n0") & ~grid].assign(stage=0, fitted=False)
    assert rows_of(pd.concat((table[grid], pilot)))["Learning rate"].endswith("no size was swept")
    other = rows_of(table.assign(loss_definition=np.where(grid, "one", "another")))
    assert other["Critical batch"].startswith("not determined: losses are not comparable")
    bare = rows_of(table.drop(columns="learning_rate"))
    assert not {"Learning rate", "Critical batch"} & set(bare)


def test_the_critical_batch_is_that_of_the_sweeps_of_both(table):
    middle = table[table["name"] == "s2-n2"].iloc[0]

    def critical(*losses):
        tried = [{**middle, "fitted": False, "batch_tokens": batch, "learning_rate": rate,
                  "loss": middle["loss"] * (loss + abs(rate - BEST))}
                 for batch, loss in zip((1e3, 2e3, 4e3), losses, strict=True)
                 for rate in (BEST / 2, BEST, 2 * BEST)]  # fmt: skip
        return rows_of(pd.concat((table, pd.DataFrame(tried))))["Critical batch"]

    assert re.match(r"1\.1×104 tokens at D 5\.56", critical(1, 1.005, 1.015))
    assert critical(1.02, 1.01, 1).startswith("above those tried at D 5.56")


def test_the_page_has_the_rate_of_the_terminal(table, tmp_path, forescale, monkeypatch):
    """Of runs that no law is fitted to, too; a file of runs doesn't say which these are."""
    table.to_csv(tmp_path / "runs.csv", index=False)
    for action in ("fit", "report"):
        module = f"forescale.scaling.actions.study_{action}"
        marked = lambda job: (read(job)[0].assign(fitted=table["fitted"]), "runs")  # noqa: E731
        monkeypatch.setattr(f"{module}.read", marked)
    words = (tmp_path / "runs.csv", "target.flops=1e21", "bootstraps=100")
    assert f"Learning rate: {BEST:g} (90%" in forescale.prints("study", "fit", *words)
    forescale.prints("study", "report", *words, f"to={tmp_path / 'page.html'}")
    page = re.sub("<[^>]*>", " ", (tmp_path / "page.html").read_text())
    assert "no size was swept" not in page
    assert re.search(rf"Learning rate\s+{BEST:g}", page)
