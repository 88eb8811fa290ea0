"""The page and the pictures of recipes that were compared."""

import numpy as np
import pytest

from forescale.config.compose import compose
from forescale.scaling.analysis.multipliers import Multipliers
from forescale.scaling.config import StudyJob
from forescale.scaling.report.recipes_page import curves, multipliers, page
from tests.trainer.scaling.simulated_recipes import runs

TABLE = runs(np.random.default_rng(0), {"good": 1.4, "<b>bad": 0.7, "far": 4.0})


@pytest.fixture(scope="module")
def results() -> Multipliers:
    return Multipliers(TABLE, compose(StudyJob, ["input=[none]"]), "here")


def test_every_recipe_has_a_row_a_dot_a_budget_and_the_line_at_one(results):
    figure = multipliers(results)
    assert [label for _, label in figure.y.ticks] == ["far", "good", "<b>bad"]
    line, *rest = figure.traces
    assert list(line.x) == [1, 1]
    dots = [t for t in rest if t.kind == "dots"]
    true = [p.multiplier.value for c in results.candidates for p in c.places]
    finite = sorted(m for m in true if np.isfinite(m))
    assert sorted(float(t.x[0]) for t in dots) == pytest.approx(finite)
    assert len(finite) == len(true) - 1, "of one the base shows a bound alone, and it has no dot"


def test_the_curve_is_the_base_and_losers_are_shown(results):
    line, *dots = curves(results).traces
    assert line.y[0] == pytest.approx(np.exp(results.curve.log_losses[0]))
    assert len(dots) == 4


def test_the_page_has_every_number_and_what_it_is_of(results):
    text, _ = page(results, TABLE, ["forescale", "study", "report"])
    for c in results.candidates:
        assert f'<data value="{c.mean.value!r}">' in text
    assert "needs more compute than base" in text
    assert "Shown for small models" in text
    assert "<b>bad" not in text
    assert text == page(results, TABLE, ["forescale", "study", "report"])[0]


@pytest.mark.slow  # seconds
def test_report_writes_the_page_the_pictures_and_the_records(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    TABLE.to_csv("recipes.csv", index=False)
    code, out, _ = forescale("study", "report", "recipes.csv", "to=r.html")
    assert code == 0
    assert "r.html" in out
    names = {p.name for p in (tmp_path / "r-files").iterdir()}
    assert names == {"multipliers.png", "multipliers.svg", "loss.png", "loss.svg", "records.csv"}
