"""A study from its plan to its score, its cells pretended: what is run, decided, foretold, kept."""

import json

import pytest

from forescale import cli
from forescale.scaling.analysis.forecast import cards
from forescale.scaling.design.plans import dump, load
from forescale.scaling.study.directory import Study
from tests.trainer.scaling.pretend import Pretend, best_rate

pytestmark = pytest.mark.slow

PLAN = ["plan.kind=isoflop", "plan.budgets=3", "plan.sizes=3", "plan.cap=1e14"]
SMALL = ["plan.sequence_length=32", "target.flops=4e13", "near=null", "bootstraps=100"]


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory, pretended):
    """Planned and launched to its end, the target included."""
    root = tmp_path_factory.mktemp("study")
    words = ["--", f"data.path={small_data}", "optimizer=adamw", "validation.every=100 %"]
    where = [f"studies={root}", "study=whole"]
    assert cli.main(["study", "plan", *where, *PLAN, *SMALL, *words]) == 0
    assert cli.main(["study", "launch", *where, "launch.at_once=2", "launch.target=true"]) == 0
    return Study(root / "whole")


def kinds(study):
    return [e["kind"] for e in study.events]


def test_every_cell_is_run_once_within_the_cap(whole):
    names = [w for words in Pretend.begun for w in words if w.startswith("run.name=")]
    assert len(names) == len(set(names)) == len(whole.plan.cells)
    assert {s.word for s in whole.states()} == {"complete"}
    assert 0.5 * whole.plan.cap < whole.spent <= whole.plan.cap


def test_sizes_between_are_trained_at_the_best_rates_of_the_ends(whole):
    for cell in whole.plan.cells:
        if cell.role == "grid":
            aim = best_rate(cell.shape.parameters)
            tried = [c for c in whole.plan.cells if c.of == cell.of and c.role == "rate"]
            if not tried:
                assert cell.learning_rate == pytest.approx(aim, rel=0.35)


def test_a_cross_with_its_best_at_an_edge_is_widened(whole):
    """The rule's first rates are far off the surface's."""
    assert "widened" in kinds(whole)
    wide = [c for c in whole.plan.cells if "-lr-higher" in c.name or "-lr-lower" in c.name]
    assert all(c.role == "rate" for c in wide)
    settled = [e for e in whole.events if e["kind"] == "settled"]
    assert [e["stage"] for e in settled] == [1, 2, 3]


def test_stages_are_centred_one_after_the_other(whole):
    order = [e["kind"] for e in whole.events if e["kind"] in ("settled", "centred")]
    assert order == ["settled", "centred", "settled", "centred", "settled"]
    assert all(s.exact for s in whole.plan.stages)


def test_each_run_of_a_later_budget_has_a_card_from_before_it_began(whole):
    """From the third budget on: one budget tells no law, and neither may the second."""
    begun = {e["cell"]: e["time"] for e in whole.events if e["kind"] == "begun"}
    found = {c.facts["target"]["run"]: c for c in cards(whole.forecasts)}
    grid = {c.name for c in whole.plan.cells if c.role == "grid" and c.stage == 3}
    assert set(found) == grid | {"target"}
    for name, card in found.items():
        assert card.path.stat().st_mtime <= begun[name]
        assert card.outcome["run"] == name


def test_rates_of_later_budgets_begin_where_the_crosses_before_led(whole):
    """The rule that a study begins with says 0.01 for all of them."""
    stage = next(s for s in whole.plan.stages if s.number == 3)
    for cell in stage.cells:
        if cell.role == "grid" and any(c.of == cell.name and c.role == "rate" for c in stage.cells):
            assert cell.learning_rate == pytest.approx(best_rate(cell.shape.parameters), rel=0.5)


def test_what_seeds_and_tuning_cost_is_measured_once_and_told_with_the_new_interval(whole):
    (event,) = (e for e in whole.events if e["kind"] == "measured")
    (level,) = event["noise"]["levels"]
    assert (level["cell"], level["runs"]) == ("s1-n1", 5)
    assert 2e-4 < level["noise"]["sd"] < 5e-3, "the surface's is 0.1 %"
    assert 0 < event["expected"]["half"]["0.5"] < 0.1


def test_the_batches_of_the_lowest_and_highest_budget_are_judged(whole):
    """The surface has none that is better."""
    events = [e for e in whole.events if e["kind"] == "basin"]
    assert [e["stage"] for e in events] == [1, 3]
    assert all(e["learning_rate"] > 0 for e in events)


def test_cells_are_measured_by_their_cards(whole):
    carded = {c.facts["target"]["run"]: str(c.path) for c in cards(whole.forecasts)}
    for cell in whole.plan.cells:
        told = [w for w in whole.words(cell) if w.startswith("forecast=")]
        assert told == ([f"forecast={carded[cell.name]}"] if cell.name in carded else [])


def test_the_target_is_trained_at_the_best_size_of_its_compute(whole):
    target = whole.plan.stages[-1].cells[0]
    assert target.role == "target"
    assert target.cost == pytest.approx(4e13, rel=0.03)
    table = whole.table().set_index("name")
    assert not table.loc["target", "fitted"]
    assert whole.state(target).word == "complete"


def test_the_law_is_fitted_to_the_best_rate_of_each_size(whole):
    table = whole.table()
    for _, own in table[table.role.isin(["grid", "rate"])].groupby("cell_of"):
        assert own.fitted.sum() == 1
        assert own[own.fitted].loss.iloc[0] == own.loss.min()
    assert not table[table.role.isin(["seed", "batch"])].fitted.any()


def test_the_same_command_again_changes_nothing(whole):
    before = (whole.folder / "plan.json").read_bytes(), len(whole.events), len(Pretend.begun)
    where = [f"studies={whole.folder.parent}", "study=whole"]
    assert cli.main(["study", "launch", *where, "launch.target=true"]) == 0
    assert cli.main(["study", "sync", *where]) == 0
    again = Study(whole.folder)
    assert before == ((whole.folder / "plan.json").read_bytes(), len(again.events),
                      len(Pretend.begun))  # fmt: skip


def test_a_plan_is_read_back_as_it_was(whole):
    assert load(json.loads(json.dumps(dump(whole.plan)))) == whole.plan


def test_what_it_was_planned_with_holds_for_its_later_commands(whole, capsys):
    where = [f"studies={whole.folder.parent}", "study=whole"]
    assert cli.main(["study", "fit", *where, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] == 9
    assert facts["foretold"]["beyond"] > 1, "the target is that of the plan"


def test_a_plan_that_has_been_launched_stays(whole, capsys):
    where = [f"studies={whole.folder.parent}", "study=whole"]
    assert cli.main(["study", "plan", *where, *PLAN, "plan.vocab_size=257"]) == 2
    assert "has been launched" in capsys.readouterr().err
