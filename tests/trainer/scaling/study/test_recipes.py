"""A study of recipes from its plan to its multipliers, with a fake training: the base needs 1.5
times the compute of muon, and 0.8 times that of no-decay; lion always diverges.

Each is best at sizes and rates of its own, and the search of each begins at muon's sizes."""

import json
import math

import numpy as np
import pytest

from forescale import cli
from forescale.scaling.analysis.multipliers import Multipliers
from forescale.scaling.design.plan import dump, load
from forescale.scaling.study.directory import Study
from tests.trainer.scaling import fake_training as fakes
from tests.trainer.scaling.simulated_recipes import law

pytestmark = pytest.mark.slow  # plans a whole study, and makes 70 runs

PLAN = [
    *("plan.kind=recipes", "plan.budgets=3", "plan.step=2", "plan.cap=1e14", "plan.seeds=[2,2]"),
    *("plan.sizes=3", "plan.dials=[tables]", "plan.ratio=4", "plan.fresh=2"),
    *("plan.sequence_length=64", "plan.candidates=[muon,no-decay,lion]"),
]
ALONE = [*PLAN, "plan.vocab_size=257", "plan.unique=4e7"]  # opens no corpus
TRUE = {"muon": 1.5, "no-decay": 0.8}
BEST = {"muon": 0.02, "adamw": 0.05}  # the rule's rate is 0.01, so that AdamW's sweep is too low
RATIO = {"muon": 4, "adamw": 60}  # the best tokens per parameter
TABLES = {"muon": 2.0, "adamw": 5.0}  # the best rate of tables, over that of matrices


def loss_of(row) -> float:
    kind = row["optimizer"]
    if kind == "lion":
        return 99.0
    m = TRUE["muon"] if kind == "muon" else 1.0 if row["weight_decay"] else TRUE["no-decay"]
    flops = row["flops_causal"]
    size = math.sqrt(flops / (6 * RATIO[kind]))
    tables = row["table_learning_rate"] / row["learning_rate"] / TABLES[kind]
    off = 0.01 * math.log(row["learning_rate"] / BEST[kind]) ** 2 + 0.005 * math.log(tables) ** 2
    off += 0.02 * math.log(row["parameters_blocks_and_head"] / size) ** 2
    seeds = [row["seed"], row["init_seed"], int(flops)]
    noise = 5e-4 * np.random.default_rng(seeds).standard_normal()
    return float(law(flops, m) * math.exp(off + noise))


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory, fake_training):
    """The study, launched to its end."""
    root = tmp_path_factory.mktemp("recipes")
    where = [f"studies={root}", "study=whole"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "simulated_loss", loss_of)
        shared = ["--", f"data.path={small_data}", "optimizer=adamw", "validation.every=100 %"]
        assert cli.main(["study", "plan", *where, *PLAN, *shared]) == 0
        assert cli.main(["study", "launch", *where, "launch.at_once=2"]) == 0
    return Study(root / "whole")


def command(study, action, *words):
    return cli.main(["study", action, f"studies={study.folder.parent}", "study=whole", *words])


def of(study, recipe, *roles):
    return [c for c in study.plan.cells if c.recipe == recipe and c.role in roles]


def test_all_recipes_spend_the_same_compute_and_the_base_goes_beyond_both_ends(whole):
    budgets = whole.plan.recipe_grid.budgets
    assert budgets[0] == pytest.approx(0.4 * budgets[1])
    assert budgets[-1] == pytest.approx(2.5 * budgets[-2])
    spent = {name: {c.stage: c.cost for c in of(whole, name, "grid")} for name in ("base", "muon")}
    assert set(spent["base"]) == {1, 2, 3, 4, 5}
    assert set(spent["muon"]) == {2, 3, 4}
    for stage, cost in spent["muon"].items():
        assert cost == pytest.approx(budgets[stage - 1], rel=0.02)
        assert cost == pytest.approx(spent["base"][stage], rel=0.02)
    assert whole.spent <= whole.plan.cap
    assert {s.status for s in whole.states()} == {"complete", "diverged"}


def test_every_recipe_is_tuned_until_its_best_rate_has_worse_ones_on_both_sides(whole):
    first = [c.learning_rate for c in of(whole, "base", "grid", "rate") if c.stage == 1]
    assert len(first) > 3, "0.02 was at the edge"
    recipes = Multipliers(whole.table(), whole.job, "here")
    assert all(c.is_bracketed for c in recipes.cells if c.recipe != "lion")
    for cell in of(whole, "base", "seed") + of(whole, "no-decay", "seed"):
        assert cell.learning_rate == pytest.approx(BEST["adamw"], rel=0.2)
    later = [c.learning_rate for c in of(whole, "base", "grid") if c.stage > 2]
    assert later == pytest.approx([BEST["adamw"]] * len(later), rel=0.3), "begins at rates so far"


def test_a_recipe_that_always_diverges_is_left_out_and_said_so(whole):
    assert {c.stage for c in of(whole, "lion", "grid", "rate", "seed")} == {2}
    assert [e["recipe"] for e in whole.events if e["kind"] == "recipe_dropped"] == ["lion"]


def test_fresh_seeds_are_of_each_recipe_and_the_base_at_the_settings_of_both(whole):
    assert [e["kind"] for e in whole.events].count("fresh_planned") >= 2
    fresh, crossed = of(whole, "muon", "confirm"), of(whole, "muon", "crossed")
    assert len(fresh) == 2
    assert {c.cell_of for c in fresh} < {c.cell_of for c in crossed}
    others = {c.seed for c in whole.plan.cells if c.role != "confirm"}
    assert not others & {c.seed for c in fresh}


def test_fit_gives_the_true_multipliers(whole, capsys):
    assert command(whole, "fit", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    candidates = {c["name"]: c for c in facts["candidates"]}
    assert set(candidates) == set(TRUE)
    assert {lost["name"] for lost in facts["without_loss"]} == {"lion"}
    for name, m in TRUE.items():
        assert candidates[name]["multiplier"]["value"] == pytest.approx(m, rel=0.06)
    confirmed = candidates["muon"]["budgets"][-1]["confirmed"]
    assert confirmed["low"] < TRUE["muon"] < confirmed["high"]
    assert confirmed["low"] > 1
    assert command(whole, "fit") == 0
    assert ", by fresh seeds: " in capsys.readouterr().out


def test_the_same_command_again_changes_nothing_and_the_plan_is_read_back(whole):
    before = (whole.folder / "plan.json").read_bytes(), len(whole.events)
    assert command(whole, "launch") == 0
    again = Study(whole.folder)
    assert before == ((whole.folder / "plan.json").read_bytes(), len(again.events))
    assert load(json.loads(json.dumps(dump(whole.plan)))) == whole.plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan.candidates=[]"], "names no recipe to compare"),
        (["plan.candidates=[mun]"], "has no recipe 'mun'"),
        (["plan.candidates=[muon,muon]"], "names muon twice"),
        (["plan.cap=1e9"], "no budget can be as low"),
        (["plan.recipes=gone.yaml"], "gone.yaml: no such file"),
        (["target.flops=1e20"], "is predicted by a law of one recipe"),
    ],
)
def test_a_plan_that_compares_nothing_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", "plan", *ALONE, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_key_of_the_study_is_refused_in_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("short: [train.steps=5]\nlate: ['schedule.decay=50 %']\n")
    words = ["plan.recipes=own.yaml", "plan.candidates=[short]"]
    assert cli.main(["study", "plan", *ALONE, *words]) == 2
    assert "train.steps is set by the study itself" in capsys.readouterr().err
    assert cli.main(["study", "plan", *ALONE, *words[:1], "plan.candidates=[late]"]) == 0
    study = Study(tmp_path / "studies/first")
    cell = of(study, "late", "grid")[0]
    arguments = [a for a in study.arguments(cell) if a.startswith("schedule.")]
    assert sorted(a.partition("=")[0] for a in arguments) == [
        "schedule.decay", "schedule.kind", "schedule.warmup",
    ]  # fmt: skip
    assert "schedule.decay=50 %" in arguments


def test_a_printed_plan_has_a_row_for_each_recipe_and_budget(small_data, tmp_path, capsys):
    shared = ["--", f"data.path={small_data}", "optimizer=adamw"]
    assert cli.main(["study", "plan", f"studies={tmp_path}", "study=printed", *PLAN, *shared]) == 0
    rows = filter(None, map(str.split, capsys.readouterr().out.splitlines()))
    candidates = {words[0]: words[1] for words in rows if words[0][:2] in ("b1", "b2", "b5")}
    of_two = {f"b2-{name}": "5" for name in ("base", "muon", "no-decay", "lion")}
    assert candidates == {"b1-base": "5", **of_two, "b5-base": "5"}
