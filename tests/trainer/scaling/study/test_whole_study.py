"""A study from its plan to its score, with a fake training: its runs, decisions and forecasts."""

import json
from dataclasses import replace

import pytest

from forescale import cli
from forescale.ground.errors import UserError
from forescale.scaling.analysis.forecast import read_forecasts
from forescale.scaling.design.plan import dump, load
from forescale.scaling.study import decisions
from forescale.scaling.study.directory import Study
from tests.trainer.scaling.fake_training import FakeTraining, best_rate

pytestmark = pytest.mark.slow  # plans, fits and forecasts a whole study

PLAN = ["plan.kind=isoflop", "plan.budgets=3", "plan.sizes=3", "plan.cap=1e14"]
SMALL = ["plan.sequence_length=32", "target.flops=4e13", "near=null", "bootstraps=100"]


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory, fake_training):
    """A study that was launched to its end, target included."""
    root = tmp_path_factory.mktemp("study")
    shared = ["--", f"data.path={small_data}", "optimizer=adamw", "validation.every=100 %"]
    where = [f"studies={root}", "study=whole"]
    assert cli.main(["study", "plan", *where, *PLAN, *SMALL, *shared]) == 0
    assert cli.main(["study", "launch", *where, "launch.at_once=2", "launch.target=true"]) == 0
    return Study(root / "whole")


def command(study, action, *words):
    return cli.main(["study", action, f"studies={study.folder.parent}", "study=whole", *words])


def kinds(study):
    return [e["kind"] for e in study.events]


def test_every_cell_is_run_once_within_the_cap(whole):
    names = [a for words in FakeTraining.started for a in words if a.startswith("run.name=")]
    assert len(names) == len(set(names)) == len(whole.plan.cells)
    assert {s.status for s in whole.states()} == {"complete"}
    assert 0.5 * whole.plan.cap < whole.spent <= whole.plan.cap


def test_sizes_between_are_trained_at_interpolated_best_rates(whole):
    for cell in whole.plan.cells:
        if cell.role == "grid":
            aim = best_rate(cell.shape.parameters)
            tried = [c for c in whole.plan.cells if c.cell_of == cell.cell_of and c.role == "rate"]
            if not tried:
                assert cell.learning_rate == pytest.approx(aim, rel=0.35)


def test_a_sweep_with_its_best_rate_at_an_edge_gets_more_rates(whole):
    """The first rates of the rule are far from the simulated best."""
    assert "rates_added" in kinds(whole)
    wide = [c for c in whole.plan.cells if "-lr-higher" in c.name or "-lr-lower" in c.name]
    assert all(c.role == "rate" for c in wide)
    chosen = [e for e in whole.events if e["kind"] == "rates_chosen"]
    assert [e["stage"] for e in chosen] == [1, 2, 3]


def test_stages_are_centred_one_after_the_other(whole):
    decisions = ("rates_chosen", "stage_centred")
    order = [kind for kind in kinds(whole) if kind in decisions]
    assert order == [*decisions, *decisions, "rates_chosen"]
    assert all(s.exact for s in whole.plan.stages)


def test_each_run_of_a_later_budget_is_forecast_before_it_starts(whole):
    """From the third budget on: two budgets determine no law here."""
    started = {e["cell"]: e["time"] for e in whole.events if e["kind"] == "cell_started"}
    forecasts = {c.facts["target"]["run"]: c for c in read_forecasts(whole.forecasts)}
    grid = {c.name for c in whole.plan.cells if c.role == "grid" and c.stage == 3}
    assert set(forecasts) == grid | {"target"}
    for name, forecast in forecasts.items():
        assert forecast.path.stat().st_mtime <= started[name]
        assert forecast.outcome["run"] == name


def test_sweeps_of_later_budgets_start_from_the_rates_found_before(whole):
    """The default rule gives 0.01 for all of them."""
    stage = next(s for s in whole.plan.stages if s.number == 3)
    swept = {c.cell_of for c in stage.cells if c.role == "rate"}
    for cell in stage.cells:
        if cell.role == "grid" and cell.name in swept:
            assert cell.learning_rate == pytest.approx(best_rate(cell.shape.parameters), rel=0.5)


def test_noise_is_measured_once_and_recorded_with_the_new_interval(whole):
    (event,) = (e for e in whole.events if e["kind"] == "noise_measured")
    (level,) = event["noise"]["levels"]
    assert (level["cell"], level["runs"]) == ("s1-n1", 5)
    assert 2e-4 < level["noise"]["sd"] < 5e-3, "the simulated noise is 0.1 %"
    assert 0 < event["expected"]["half"]["0.5"] < 0.1


def test_the_batch_sweeps_of_the_lowest_and_highest_budget_are_recorded(whole):
    """The simulated loss does not depend on the batch."""
    events = [e for e in whole.events if e["kind"] == "response_measured"]
    assert [e["stage"] for e in events] == [1, 3]
    assert all(e["learning_rate"] > 0 for e in events)


def test_cells_train_against_their_forecasts(whole):
    paths = {c.facts["target"]["run"]: str(c.path) for c in read_forecasts(whole.forecasts)}
    for cell in whole.plan.cells:
        words = [a for a in whole.arguments(cell) if a.startswith("forecast=")]
        assert words == ([f"forecast={paths[cell.name]}"] if cell.name in paths else [])


def test_the_target_is_trained_at_the_best_size_of_its_compute(whole):
    target = whole.plan.stages[-1].cells[0]
    assert target.role == "target"
    assert target.cost == pytest.approx(4e13, rel=0.03)
    table = whole.table().set_index("name")
    assert not table.loc["target", "fitted"]
    assert whole.state(target).status == "complete"


def test_the_target_is_no_larger_than_fits(whole, monkeypatch):
    best, cells = whole.plan.cells[-1].shape.parameters, []
    bound = replace(whole.job.target, most_parameters=best / 2)
    monkeypatch.setattr(whole, "job", replace(whole.job, target=bound))
    monkeypatch.setattr(decisions, "forecast_cells", lambda *words: cells.extend(words[2]))
    monkeypatch.setattr(decisions, "read_forecasts", lambda path: [])
    with pytest.raises(UserError, match="has no forecast"):
        decisions.add_target(whole, print)
    assert cells[0].shape.parameters == pytest.approx(best / 2, rel=0.1)
    assert cells[0].cost == pytest.approx(4e13, rel=0.03)


def test_the_law_is_fitted_to_the_best_rate_of_each_size(whole):
    table = whole.table()
    for _, runs in table[table.role.isin(["grid", "rate"])].groupby("cell_of"):
        assert runs.fitted.sum() == 1
        assert runs[runs.fitted].loss.iloc[0] == runs.loss.min()
    assert not table[table.role.isin(["seed", "batch"])].fitted.any()


def test_the_same_command_again_changes_nothing_and_the_plan_is_read_back(whole):
    assert load(json.loads(json.dumps(dump(whole.plan)))) == whole.plan
    before = (whole.folder / "plan.json").read_bytes(), len(whole.events), len(FakeTraining.started)
    assert command(whole, "launch", "launch.target=true") == 0
    assert command(whole, "sync") == 0
    again = Study(whole.folder)
    assert before == ((whole.folder / "plan.json").read_bytes(), len(again.events),
                      len(FakeTraining.started))  # fmt: skip


def test_later_commands_use_the_settings_of_the_plan(whole, capsys):
    assert command(whole, "fit", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] == 9
    assert facts["prediction"]["extrapolation_factor"] > 1, "the target is that of the plan"


def test_the_plan_of_a_launched_study_is_not_replaced(whole, capsys):
    assert command(whole, "plan", *PLAN, "plan.vocab_size=257") == 2
    assert "has been launched" in capsys.readouterr().err
