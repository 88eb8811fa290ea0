"""What a study of recipes decides and tabulates, of given losses: nothing is trained."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.scaling.analysis.multipliers import Multipliers
from forescale.scaling.analysis.recipe_cells import cells_of
from forescale.scaling.config import PlanKeys, StudyJob
from forescale.scaling.design.kinds import recipes_plan
from forescale.scaling.design.shapes import Common
from forescale.scaling.study import directory
from forescale.scaling.study.decisions import advance
from forescale.scaling.study.directory import CellState, Study
from tests.trainer.scaling.simulated_recipes import law

CAP = 8e12


def plan_of(folder, **recipes):
    """The plan of the base and these recipes at two budgets."""
    file = folder / "own.yaml"
    file.write_text("".join(f"{name}: [{words}]\n" for name, words in recipes.items()))
    keys = PlanKeys(CAP, "recipes", [*recipes], recipes=str(file), budgets=2, step=2.0, fresh=2)
    keys.sizes, keys.dials = 1, []
    common = Common(compose(TrainJob, keys.shared).model, 257, 64, seeds=(2, 2))
    return recipes_plan(StudyJob(plan=keys), common)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan of the base and one recipe, `new`."""
    return plan_of(tmp_path_factory.mktemp("recipes"), new="model.norm=layernorm")


@pytest.fixture
def study(tmp_path, planned):
    """A study of that plan, of which nothing has run."""
    job = StudyJob(studies=str(tmp_path), study="own")
    return Study.make(job.folder, job, planned, {})


def tune(study, keep=lambda cell: True, stages=range(99)):
    """Take the learning rates of these stages as chosen, and keep some of the cells alone."""
    plan = replace(study.plan, stages=tuple(
        replace(s, exact=bool(s.cells), cells=tuple(
            replace(c, waits_for=() if s.number in stages else c.waits_for)
            for c in s.cells if keep(c)
        ))
        for s in study.plan.stages
    ))  # fmt: skip
    study.revise(plan, "rates_chosen")


@pytest.mark.parametrize("diverged", [False, True])
def test_a_recipe_that_diverged_at_the_highest_budget_gets_no_fresh_seeds(
    study, monkeypatch, diverged
):
    """There its sweep is left, without other seeds."""
    tune(study, lambda c: not diverged or (c.stage, c.recipe, c.role) != (3, "new", "seed"))
    monkeypatch.setattr(study, "states", list)
    advance(study, lambda line: None)
    fresh = [(c.recipe, c.seed) for c in study.plan.stages[-1].cells]
    assert study.plan.stages[-1].exact
    assert [name for name, _ in fresh] == ([] if diverged else ["base", "base", "new", "new"])
    assert len(set(fresh)) == len(fresh)


@pytest.mark.parametrize("rate", [None, 0.02])
def test_fresh_seeds_of_both_have_the_settings_of_both_but_rates_of_another_optimizer(
    study, monkeypatch, rate
):
    tune(study)
    plan = study.plan
    grid = replace(plan.recipe_grid, dials=("tables", "batch"))
    stages = [replace(s, cells=tuple(
        replace(c, trial=replace(c.trial, batch=4.0, tables=3.0), learning_rate=0.7)
        if (c.recipe, c.role) == ("new", "seed") else replace(c, trial=replace(c.trial, tables=1.0))
        for c in s.cells
    )) for s in plan.stages]  # fmt: skip
    recipes = (plan.recipes[0], replace(plan.recipes[1], rate=rate))
    study.revise(replace(plan, stages=tuple(stages), recipe_grid=grid, recipes=recipes), "planned")
    monkeypatch.setattr(study, "states", list)
    advance(study, lambda line: None)
    cells = [c for c in study.plan.stages[-1].cells if c.role == "crossed"]
    planned = {(c.recipe, c.cell_of): c for c in cells}
    assert len(cells) == 2 * len(planned) == 8
    base, moved = planned["base", "b3-base"], planned["base", "b3-new"]
    assert (moved.trial.batch, planned["new", "b3-base"].trial.batch) == (4.0, base.trial.batch)
    assert planned["new", "b3-base"].global_batch == base.global_batch != moved.global_batch
    same = planned["new", "b3-new"] if rate is None else base
    assert (moved.learning_rate, moved.trial.tables) == (same.learning_rate, same.trial.tables)


@pytest.mark.parametrize(
    ("best", "diverged", "settings"),
    [
        ("base", "", {"base": "base", "new": "base", "other": "base"}),
        ("new", "", {"base": "new", "new": "new", "other": "new"}),  # by a third step of runs
        ("other", "new", {"base": "other", "new": "new", "other": "other"}),
    ],
)
def test_other_fresh_seeds_confirm_all_where_the_first_ones_were_best_and_the_base_too(
    tmp_path, monkeypatch, best, diverged, settings
):
    """best: the recipe whose settings suit all, whatever their searches thought."""
    job = StudyJob(studies=str(tmp_path), study="own")
    plan = plan_of(tmp_path, new="model.norm=layernorm", other="model.mlp=gelu")
    study = Study.make(job.folder, job, plan, {})
    tune(study)
    rates = {"base": 0.1, "new": 0.2, "other": 0.3}
    stages = [replace(s, cells=tuple(
        replace(c, learning_rate=rates[c.recipe]) if c.role == "seed" else c for c in s.cells
    )) for s in study.plan.stages]  # fmt: skip
    study.revise(replace(study.plan, stages=tuple(stages)), "planned")

    def losses():
        return {c.name: np.nan if c.recipe == diverged else 3 + (c.cell_of != f"b3-{best}")
                for c in study.plan.stages[-1].cells}  # fmt: skip

    def run(role):
        advance(study, lambda line: None)
        return {(c.recipe, c.cell_of.removeprefix("b3-"), c.seed)
                for c in study.plan.stages[-1].cells if c.role == role}  # fmt: skip

    monkeypatch.setattr(study, "states", list)
    monkeypatch.setattr(study, "losses", losses)
    crossed = run("crossed")
    between = {(of, at) for of, at, _ in crossed if {of, at} == {"new", "other"}}
    assert between == {"base": set(), "new": {("other", "new")}, "other": {("new", "other")}}[best]
    fresh = run("confirm")
    assert {of: at for of, at, _ in fresh} == settings
    assert len(fresh) == 2 * len(settings)
    assert not {seed for *_, seed in crossed} & {seed for *_, seed in fresh}
    assert run("confirm") == fresh


def test_what_failed_or_is_excluded_chooses_no_settings(study, monkeypatch):
    """A setting that is out by an error would leave the choice unseen."""
    tune(study)
    seeds = {c.name: 0.2 for c in study.plan.cells if (c.recipe, c.role) == ("new", "seed")}
    stages = [replace(s, cells=tuple(
        replace(c, learning_rate=seeds.get(c.name, c.learning_rate)) for c in s.cells
    )) for s in study.plan.stages]  # fmt: skip
    study.revise(replace(study.plan, stages=tuple(stages)), "planned")
    monkeypatch.setattr(
        study, "states", lambda: [CellState(c, "ready") for c in study.plan.stages[-1].cells]
    )
    advance(study, lambda line: None)
    fresh = study.plan.stages[-1].cells
    at_new = [c for c in fresh if (c.recipe, c.cell_of) == ("base", "b3-new")]

    def states(of_new):
        return [CellState(c, of_new if c == at_new[0] else "complete", 2 + (c not in at_new))
                for c in fresh]  # fmt: skip

    monkeypatch.setattr(study, "states", lambda: states("failed"))
    with pytest.raises(UserError, match=rf"can't compare settings: {at_new[0].name} failed.*retry"):
        advance(study, lambda line: None)
    monkeypatch.setattr(study, "states", lambda: [replace(s, status="excluded") if s.cell in at_new
                                                  else s for s in states("complete")])  # fmt: skip
    advance(study, lambda line: None)
    confirmed = {(c.recipe, c.cell_of) for c in study.plan.stages[-1].cells if c.role == "confirm"}
    assert confirmed == {("base", "b3-base"), ("new", "b3-new")}


def test_all_get_the_settings_at_which_the_base_was_best_and_not_another_optimizers_rates(
    tmp_path, monkeypatch
):
    """The base was best with the batch of `other`, whose optimizer has rates of its own."""
    job = StudyJob(studies=str(tmp_path), study="own")
    plan = plan_of(tmp_path, new="model.norm=layernorm", other="model.mlp=gelu")
    study = Study.make(job.folder, job, plan, {})
    tune(study)
    rates = {"base": 0.1, "new": 0.2, "other": 0.3}
    stages = [replace(s, cells=tuple(
        replace(c, learning_rate=rates[c.recipe],
                trial=replace(c.trial, batch=4.0 if c.recipe == "other" else 1.0))
        if c.role == "seed" else c for c in s.cells
    )) for s in study.plan.stages]  # fmt: skip
    base, new, other = study.plan.recipes
    study.revise(replace(
        study.plan, stages=tuple(stages), recipes=(base, new, replace(other, rate=0.3)),
        recipe_grid=replace(study.plan.recipe_grid, dials=("batch",)),
    ), "planned")  # fmt: skip
    monkeypatch.setattr(study, "states", list)
    monkeypatch.setattr(study, "losses", lambda: {
        c.name: 3 + (c.cell_of != "b3-other") for c in study.plan.stages[-1].cells
    })  # fmt: skip
    advance(study, lambda line: None)
    cells = study.plan.stages[-1].cells
    planned = {(c.recipe, c.cell_of): (c.learning_rate, c.trial.batch) for c in cells}
    assert planned["base", "b3-other"] == planned["new", "b3-other"] == (0.1, 4.0)


@pytest.mark.parametrize(
    ("best", "is_inside"), [(1.3, True), (1.6, True), (0.65, True), (30.0, True), (1e9, False)]
)
def test_a_search_goes_on_beyond_its_edge_and_has_as_many_runs_wherever_its_best_is(
    study, monkeypatch, best, is_inside
):
    """best: in units of the first rate, with rates of 1/2, 1 and 2 times it to begin with."""
    first = study.plan.cells[0].learning_rate

    def losses():
        return {c.name: 3 * np.exp(0.01 * np.log(c.learning_rate / first / best) ** 2)
                for c in study.plan.stages[0].cells if not c.waits_for}  # fmt: skip

    lines = list[str]()
    monkeypatch.setattr(study, "losses", losses)
    for _ in range(12):
        advance(study, lines.append)
    row = study.plan.stages[0]
    tried = [c.learning_rate / first for c in row.cells if c.role in ("grid", "rate")]
    assert len(tried) == len(set(tried)) == study.plan.recipe_grid.trials(1)
    assert (min(tried) < best < max(tried)) == is_inside
    (rate,) = {c.learning_rate / first for c in row.cells if c.role == "seed"}
    assert (rate == pytest.approx(best, rel=0.1)) == is_inside
    (event,) = (e for e in study.events if e["kind"] == "rates_chosen")
    assert (event["edges"] == []) == is_inside
    assert any("not an optimum" in line for line in lines) != is_inside
    assert row.cost <= row.high


def test_a_sweep_that_is_excluded_gets_no_more_rates_and_its_recipe_ends_there(study):
    tune(study, stages=[1])
    swept = [c for c in study.plan.stages[1].cells if c.recipe == "new" and not c.waits_for]
    for cell in swept:
        study.event("cell_excluded", cell=cell.name, why="no time")
    lines = list[str]()
    advance(study, lines.append)
    assert [c for s in study.plan.stages for c in s.cells if c.recipe == "new"] == swept
    (line,) = lines
    assert line == "new: each of its runs is excluded in stage 2; it is left out from here on."


def test_a_sweep_of_an_earlier_version_is_not_gone_on_with(study, monkeypatch):
    tune(study, stages=())
    first = study.plan.stages[0]
    old = replace(first, cells=tuple(replace(c, trial=None) for c in first.cells))
    study.revise(study.plan.with_stage(old), "planned")
    monkeypatch.setattr(study, "losses", lambda: {c.name: 3.0 for c in study.plan.cells})
    with pytest.raises(UserError, match=r"was planned by an earlier version.*plan a new study"):
        advance(study, lambda line: None)


def test_a_next_budget_above_the_cap_is_refused_before_it_begins(study, monkeypatch):
    first = study.plan.stages[0]
    done = replace(first, cells=tuple(replace(c, waits_for=()) for c in first.cells))
    study.revise(study.plan.with_stage(done), "rates_chosen")
    monkeypatch.setattr(study, "states", list)
    plan = study.plan
    study.plan = replace(plan, cap=plan.high * 0.99)
    with pytest.raises(UserError, match=r"cap: stage 2 raises the plan's cost to .*end this one"):
        advance(study, lambda line: None)
    assert not study.plan.stages[1].exact
    study.plan = plan
    advance(study, lambda line: None)
    assert study.plan.stages[1].exact


@pytest.mark.parametrize("cost", ["causal", "full", "6nd"])
def test_a_run_that_diverged_counts_its_compute_by_every_convention(study, monkeypatch, cost):
    cells = [c for c in study.plan.cells if c.stage == 2]
    states = [
        CellState(c, "diverged" if c.name.endswith("-try3") else "complete", 3.0) for c in cells
    ]
    records = [
        {"name": c.name, "loss": 3.0, "learning_rate": c.learning_rate,
         **{f"flops_{convention}": flops for convention, flops in c.flops.items()}}
        for c in cells if not c.name.endswith("-try3")
    ]  # fmt: skip
    monkeypatch.setattr(study, "states", lambda: states)
    monkeypatch.setattr(directory, "of_runs", lambda runs: (pd.DataFrame(records), []))
    recipes, _ = cells_of(study.table(), replace(study.job, cost=cost), "here")
    assert {c.recipe: c.diverged for c in recipes} == {"base": 1, "new": 1}
    for c in cells:
        row = study.table().set_index("name").loc[c.name]
        assert row[f"flops_{cost}"] == c.flops[cost]


# What is best for each recipe: tokens a parameter, learning rate, and rate of tables over that.
BEST = {"base": (60, 0.05, 6.0), "new": (4, 0.01, 1.0)}


def simulated_loss(cell) -> float:
    """The base needs 1.4 times the compute of `new`, each at its best size and rates."""
    ratio, rate, tables = BEST[cell.recipe]
    flops, share = cell.flops["causal"], dict(cell.shares).get("optimizer.table_learning_rate", 1.0)
    off = 0.02 * np.log(cell.shape.parameters / np.sqrt(flops / (6 * ratio))) ** 2
    off += 0.01 * np.log(cell.learning_rate / rate) ** 2 + 0.01 * np.log(share / tables) ** 2
    noise = 3e-4 * np.random.default_rng([cell.seed, int(flops)]).standard_normal()
    return float(law(flops, 1.4 if cell.recipe == "new" else 1.0) * np.exp(off + noise))


@pytest.mark.parametrize(("sizes", "dials", "is_true"), [(1, [], False), (3, ["tables"], True)])
def test_multipliers_are_of_recipes_at_their_best_sizes_and_rates(
    tmp_path, monkeypatch, sizes, dials, is_true
):
    """At one size a budget, near that of `new`, and without a rate of tables, it looks far better
    than it is."""
    file = tmp_path / "own.yaml"
    file.write_text("new: [model.norm=layernorm]")
    keys = PlanKeys(3e14, "recipes", ["new"], recipes=str(file), budgets=3, beyond=2, ratio=4.0)
    keys.sizes, keys.dials = sizes, dials
    job = StudyJob(studies=str(tmp_path), study="fair", plan=keys)
    common = Common(compose(TrainJob, keys.shared).model, 257, 64, seeds=(2, 2))
    study = Study.make(job.folder, job, recipes_plan(job, common), {})

    def runs() -> list:
        exact = [s for s in study.plan.stages if s.exact]
        return [c for s in exact for c in s.cells if not c.waits_for]

    def table() -> pd.DataFrame:
        return pd.DataFrame([
            {"recipe": c.recipe, "budget": c.budget, "role": c.role, "loss": simulated_loss(c),
             "learning_rate": c.learning_rate, "edges": c.edges, "flops": c.flops["causal"],
             "parameters": c.shape.parameters, "tokens": c.tokens, "bytes": c.tokens * 4.0,
             "cell_of": c.cell_of}
            for c in runs()
        ])  # fmt: skip

    monkeypatch.setattr(study, "states", list)
    monkeypatch.setattr(study, "table", table)
    monkeypatch.setattr(study, "losses", lambda: {c.name: simulated_loss(c) for c in runs()})
    lines, before = list[str](), None
    while before != study.plan:
        before = study.plan
        advance(study, lines.append)
    assert study.plan.stages[-1].exact
    results = Multipliers(table(), job, "here")
    (new,) = results.candidates
    assert (new.mean.value == pytest.approx(1.4, rel=0.06)) == is_true
    assert any("one size a budget" in doubt for doubt in results.doubts) != is_true
    counts = [sum(c.recipe == name for c in study.plan.cells if c.role in ("grid", "rate")
              and c.stage in (2, 3, 4)) for name in BEST]  # fmt: skip
    assert counts[0] == counts[1]
    # Both go on from the base's search below, but for the rates of another optimizer.
    first = {c.recipe: c.trial for c in study.plan.stage(2).cells if c.role == "grid"}
    assert first["new"] == first["base"]
    if is_true:
        grid, other = study.plan.recipe_grid, replace(study.plan.recipes[1], rate=0.01)
        seeds = [c for c in study.plan.stage(1).cells if c.role == "seed"]
        taken = grid.start(common, other, 2, seeds)
        assert first["base"].tables == seeds[0].trial.tables == 4.0
        assert taken == replace(first["base"], tables=1.0)
        small = [replace(c, trial=replace(c.trial, batch=0.125)) for c in seeds]
        grows = replace(study.plan.recipes[1], first_batch=0.25)  # of one window: none
        all_dials = replace(grid, dials=(*grid.dials, "batch"))
        assert all_dials.start(common, study.plan.recipes[1], 2, small).batch == 0.125
        assert all_dials.start(common, grows, 2, small).batch == 1.0
        for c in results.cells:
            assert c.ratio == pytest.approx(BEST[c.recipe][0], rel=0.6)
        # At equal loss the base has more tokens and fewer parameters by what both ratios say.
        top = new.places[-1].others
        shift = np.sqrt(1.4 * 60 / 4)
        assert top["bytes"].value == pytest.approx(shift, rel=0.4)
        assert top["parameters"].value == pytest.approx(1.4 / shift, rel=0.4)
    else:
        assert new.places[0].multiplier.value > 2
