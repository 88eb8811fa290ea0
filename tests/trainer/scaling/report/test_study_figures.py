"""The part of a report beside the law: figures hold the study's own numbers; edges, pending
forecasts and diverged runs are marked."""

import re

import numpy as np
import pytest

from forescale import cli
from forescale.pages.figure import shades
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import TargetPoint
from forescale.scaling.report import fit_page as module
from forescale.scaling.report import study_figures as figures
from forescale.scaling.report.evidence import evidence, gather, sweep_response
from forescale.scaling.report.study_sections import forecast_section
from forescale.scaling.study.directory import Study
from tests.trainer.scaling.fake_training import train
from tests.trainer.scaling.report.test_fit_page import section, text, values
from tests.trainer.scaling.simulated_study import BEND, BEST, BUDGETS, job, known, records

HOSTILE = "<img src=x onerror=alert(1)> $\\frac{"
COMMAND = ("forescale", "study", "report")


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    return known(tmp_path_factory.mktemp("forecasts"))


@pytest.fixture(scope="module")
def html(observed):
    return module.page(StudyFit(observed.fitted, job(), "x"), observed, "27 cells", COMMAND)[0]


def dots(figure):
    """(shape, x, y) of each dot; the shape of a hollow one is with a ring."""
    return [
        (t.shapes[0] + " ring" * hollow, x, y)
        for t in figure.traces
        if t.kind == "dots"
        for hollow, x, y in zip(t.hollow, t.x, t.y, strict=True)
    ]


def of_cell(observed, name):
    return next(c for c in observed.rate_sweeps if c.cell == name)


def test_the_parabola_of_a_sweep_finds_its_best_rate(observed):
    names = ["s1-n0", "s1-n4", "s2-n0", "s2-n4", "s3-n0", "s3-n4"]
    assert [c.cell for c in observed.rate_sweeps] == names
    sweep = of_cell(observed, "s1-n0")
    assert sweep.inside
    assert sweep.best == pytest.approx(BEST)
    assert sweep.bend == pytest.approx(BEND)
    assert sweep.gap == pytest.approx(BEND * np.log(0.8) ** 2)
    assert sweep.rise == pytest.approx(BEND * np.log(np.array([0.4, 0.8, 1.6])) ** 2)


def test_a_best_rate_at_an_edge_is_hollow_and_noted(observed, html):
    edge = of_cell(observed, "s3-n4")
    assert not edge.inside
    assert edge.bend is None
    drawn = dots(figures.sweep_responses([edge], "learning rate", {}))
    assert ("circle ring", 1.0, 0.0) in drawn
    assert [s for s, *_ in drawn].count("circle ring") == 1
    assert "s3-n4: the best of 4 learning rates, 0.02, is at the edge" in text(html)
    inside = dots(figures.sweep_responses([of_cell(observed, "s1-n0")], "learning rate", {}))
    assert {s for s, *_ in inside} == {"circle"}


def test_a_diverged_run_is_a_cross_at_the_top(observed, html):
    edge = of_cell(observed, "s3-n4")
    assert edge.values[-1] == 0.08
    assert edge.losses[-1] == np.inf
    drawn = dots(figures.sweep_responses([edge], "learning rate", {}))
    highest = max(y for s, _, y in drawn if s != "cross")
    assert [(x, y > highest) for s, x, y in drawn if s == "cross"] == [(4.0, True)]
    assert "s3-n4: 1 of 4 learning rates diverged" in text(html)


def test_curves_pass_through_the_runs_in_the_colour_of_their_budget(observed):
    colours = shades(np.array(BUDGETS))
    sweep = of_cell(observed, "s2-n0")
    (curve, *_) = figures.sweep_responses([sweep], "learning rate", colours).traces
    assert curve.colours[0] == colours[BUDGETS[1]]
    assert curve.y[[0, -1]] == pytest.approx(100 * sweep.rise[[0, -1]])


def test_runs_beyond_the_parabola_are_joined_by_thin_lines():
    sweep = sweep_response(
        "a", 1, None, 1e5, 1e6, np.array([1, 2, 4, 8.0]), np.array([9, 2, 1.9, 2.5])
    )
    assert sweep.ends == (2.0, 8.0)
    thin = [t for t in figures.sweep_responses([sweep], "batch", {}).traces if t.width == 0.7]
    assert [t.x.tolist() for t in thin] == [[1 / sweep.best, 2 / sweep.best]]


def test_batches_have_a_figure_of_their_own_and_two_give_no_optimum(observed, html):
    (check,) = observed.batch_sweeps
    assert check.values.tolist() == [4, 8, 16]
    assert check.inside
    assert 'id="response-batch"' in section(html, "response")
    table = records()
    (check,) = evidence(job(), table[table["name"] != "s2-n2-batch-4"]).batch_sweeps
    assert not check.inside
    assert dots(figures.sweep_responses([check], "batch", {}))[0][0] == "circle ring"


@pytest.fixture
def scored(tmp_path):
    """The evidence once the target has a loss 2 % above what was predicted before its run."""
    evidence = known(tmp_path)
    forecast = evidence.forecasts[0]
    forecast.record_outcome("target", 1.02 * forecast.facts["loss"])
    return evidence, forecast


def test_the_prediction_before_the_run_stands_beside_its_observed_loss(scored):
    evidence, forecast = scored
    study = StudyFit(evidence.fitted, job(target=TargetPoint(flops=2e20, run="target")), "x")
    html, (answer, *_) = module.page(study, evidence, "27 cells", COMMAND)
    loss, today = forecast.facts["loss"], study.predict().loss
    assert abs(loss - today) > 1e-5
    assert values(section(html, "prediction"))[:3] == [loss, 1.02 * loss, 1.02 - 1]
    inside = forecast.facts["interval"][1] > 1.02 * loss
    side = "inside" if inside else "outside"
    words = text(section(html, "prediction"))
    assert f"+2.00% from the predicted loss, {side} the 90% interval" in words
    assert f"in forecast 0001. The runs of today would predict {today:.5g}." in words
    (_, figure, _) = answer.pictures[0]
    *_, star, diamond = figure.traces
    assert [(t.shapes, t.y.tolist()) for t in (star, diamond)] == [
        (["star"], [loss]), (["diamond"], [1.02 * loss])
    ]  # fmt: skip


@pytest.mark.parametrize("target", [{"flops": 4e20, "run": "target"}, {"flops": 2e20}])
def test_a_forecast_of_another_target_is_not_the_answer(scored, target):
    study = StudyFit(scored[0].fitted, job(target=TargetPoint(**target)), "x")
    html, _ = module.page(study, scored[0], "27 cells", COMMAND)
    assert values(section(html, "prediction"))[0] == study.predict().loss
    assert "Observed" not in text(section(html, "prediction"))


def test_the_table_of_forecasts_says_whether_the_target_was_inside(scored):
    evidence, forecast = scored
    drawn = forecast_section(evidence.forecasts, evidence.score)
    assert drawn.rows[0][6:8] == ["to predicted", "inside"]
    assert [row[7] for row in drawn.rows[1:]] == ["yes", "yes", "no"]
    assert text(drawn.after[0]).startswith(f"The target: predicted {forecast.facts['loss']:.5g} (")
    assert "+2.00% from the predicted loss, inside the 90% interval" in text(drawn.after[0])


def test_forecasts_are_ordered_by_compute_and_show_the_observed_losses(observed, html):
    figure = figures.forecasts(observed.forecasts)
    order = ("s3-n2", "s3-n1", "target")
    labels = [label for _, label in figure.y.ticks]
    assert set(labels[:2]) == set(order[:2])
    assert labels[2] == "target"
    drawn = {labels[int(y)]: (s, x) for s, x, y in dots(figure)}
    for forecast in observed.forecasts:
        f, outcome = forecast.facts, forecast.outcome
        symbol, error = drawn[f["target"]["run"]]
        if outcome is None:
            assert (symbol, error) == ("circle ring", 0.0)
            continue
        inside = f["interval"][0] <= outcome["loss"] <= f["interval"][1]
        assert symbol == ("circle" if inside else "diamond")
        assert error == pytest.approx(100 * (outcome["loss"] / f["loss"] - 1))
    assert sorted(s for s, _ in drawn.values()) == ["circle", "circle ring", "diamond"]
    outer, inner = (t for t in figure.traces if t.kind == "line")
    first = next(c for c in observed.forecasts if c.facts["target"]["run"] == order[0])
    at = 3 * labels.index(order[0])
    for drawn_ends, name in ((outer, "interval"), (inner, "interval_50")):
        ends = [100 * (x / first.facts["loss"] - 1) for x in first.facts[name]]
        assert drawn_ends.x[at : at + 2].tolist() == pytest.approx(ends)


def test_coverage_and_skill_are_in_the_caption(observed, html):
    words = text(section(html, "forecasts"))
    assert f"2 of 3 forecasts have an observed loss: {observed.score.inside} inside" in words
    line = f"{observed.score.skill['line']:+.2f}".replace("-", "−")
    assert f"line {line}" in words


def test_seeds_of_weights_and_of_data_have_different_symbols(observed, html):
    figure = figures.repeats(observed.records, observed.noise.levels)
    kinds = {t.shapes[0]: t.x.tolist() for t in figure.traces}
    assert {symbol: len(x) for symbol, x in kinds.items()} == {
        "circle": 1,
        "square": 2,
        "diamond": 2,
    }
    assert kinds["square"][0] < kinds["circle"][0] < kinds["diamond"][0]
    (level,) = observed.noise.levels
    runs = observed.records[observed.records["cell_of"] == "s2-n2"]
    runs = runs[runs["role"] != "batch"]
    y = 100 * np.log(runs["loss"].to_numpy())
    assert sorted(v for t in figure.traces for v in t.y) == pytest.approx(sorted(y - y.mean()))
    assert repr(level.weights.sd) in section(html, "noise")


def test_costs_are_compared_with_the_plan_and_the_cap(observed, html):
    words = section(html, "costs")
    assert repr(sum(s.spent for s in observed.stages)) in words
    assert [s.ettr for s in observed.stages] == pytest.approx([0.6, 0.75, 9 / 11])
    assert all(repr(s.ettr) in words for s in observed.stages)
    bars = figures.hours(observed.stages).traces
    for i in range(3):
        assert sum(bar.high[i] - bar.x[i] for bar in bars) == pytest.approx(100)


def test_provenance_names_data_code_hardware_and_time(html):
    words = text(section(html, "provenance"))
    days = "1970-01-01 00:00:00 UTC to 1970-01-02 00:00:00 UTC"
    for part in ("d" * 64, "t" * 64, "v" * 64, "0.1.0", "H100", "torch 2.9 and 2.10", "Command",
                 days, "of 15 runs; 18 more", "records.csv, 33 rows"):  # fmt: skip
        assert part in words


def test_every_section_with_numbers_names_its_runs(html):
    for part in html.split("<section ")[1:]:
        if "<table" in part and 'id="provenance"' not in part:
            assert re.search(r'class="rests">From .*href="#provenance"', part)


def test_sections_without_data_are_left_out(observed):
    plain = observed.fitted.drop(columns=["role", "cell_of", "stage", "fitted"])
    fit = StudyFit(plain, job(), "x")
    html, _ = module.page(fit, evidence(job(), plain), "runs", COMMAND)
    for name in ("forecasts", "response", "noise", "costs"):
        assert f'<section id="{name}">' not in html


def test_without_a_law_the_rest_is_shown(observed):
    html, _ = module.page("too few runs.", observed, "cells", COMMAND)
    assert "There is no law yet: too few runs." in section(html, "prediction")
    assert 'id="response-rate"' in html
    assert 'id="isoflop-curves"' not in html


def test_names_of_runs_are_shown_as_text(tmp_path):
    hostile = known(tmp_path, HOSTILE)
    html = module.page("no", hostile, "cells", COMMAND)[0].split("</head>")[1]
    assert "onerror" in html
    assert "<img" not in html


def test_runs_without_a_plan_bring_no_forecasts_or_costs(tmp_path, observed):
    without = gather(job(studies=str(tmp_path), study="none"), observed.records)
    assert (without.forecasts, without.stages, without.folder) == ([], (), "")
    assert without.rate_sweeps


@pytest.mark.slow  # draws several reports
def test_a_planned_study_has_a_report_at_any_time(small_data, tmp_path, capsys):
    """Before there is a law, and when all cells are complete."""
    where = [f"studies={tmp_path}", "study=own"]
    sizes = "[[2e4,1e5],[3e4,2e5],[4e4,4e5],[6e4,8e5],[9e4,16e5],[13e4,32e5]]"
    shared = ["--", f"data.path={small_data}", "optimizer=adamw", "validation.every=100 %"]
    plan = ["plan.kind=list", f"plan.runs={sizes}", "plan.cap=1e13", "plan.sequence_length=32"]
    assert cli.main(["study", "plan", *where, *plan, *shared]) == 0
    study = Study(tmp_path / "own")
    report = ["study", "report", *where, "bootstraps=100", "form=frontier"]
    cells = [c for c in study.plan.cells if c.role == "grid"]
    for cell in cells[:2]:
        train(study.arguments(cell))
    assert cli.main(report) == 0
    path = study.folder / "report.html"
    html = path.read_text()
    assert "There is no law yet" in section(html, "prediction")
    assert f"2 of {len(study.plan.cells)}" in section(html, "costs")
    for cell in cells[2:]:
        train(study.arguments(cell))
    assert cli.main(report) == 0
    html = path.read_text()
    assert 'id="loss-by-compute"' in html
    assert "6 complete" in text(section(html, "costs"))
    spent = sum(s.spent for s in Study(study.folder).states())
    assert repr(spent) in section(html, "costs")
    assert f"{study.folder}: study.yaml" in text(section(html, "provenance"))
    assert (study.folder / "report-files" / "prediction.png").is_file()
    assert "Figures for papers" in capsys.readouterr().out
