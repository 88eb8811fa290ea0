"""Plans of studies: their runs, their costs, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.flops import flops_per_token
from forescale.scaling.config import PlanKeys, StudyJob
from forescale.scaling.design.cells import share_trunks
from forescale.scaling.design.kinds import isoflop_plan, ladder_plan, list_plan
from forescale.scaling.design.plan import dump, extra_rates, load
from forescale.scaling.design.shapes import SEEDS, Common
from forescale.scaling.design.tuning import best_rates

BASE = ModelConfig(width=128, num_layers=3, num_heads=2)
COMMON = Common(BASE, 512, 256, rate=1e10, unique=1e8)
CAP = 1e16
SIZES, MULTIPLES = [1e5, 2e5, 4e5, 8e5], [0.5, 1, 2, 4]


def isoflop(common=COMMON, cap=CAP, **keys):
    return isoflop_plan(StudyJob(plan=PlanKeys(cap, **keys)), common)


def ladder(sizes=SIZES, multiples=MULTIPLES, cap=CAP):
    return ladder_plan(StudyJob(plan=PlanKeys(cap, ladder=sizes, multiples=multiples)), COMMON)


def listed(runs, cap=CAP):
    return list_plan(StudyJob(plan=PlanKeys(cap, runs=runs)), COMMON)


@pytest.fixture(scope="module")
def grid():
    return isoflop(cap=8e15)


@pytest.fixture(scope="module")
def rungs():
    return ladder()


def best_of_sizes(stage, losses):
    """The best learning rate of each swept size, and the tuning gap."""
    runs = [(c.shape.parameters, c.learning_rate, losses[c.name]) for c in stage.sweep("")]
    return best_rates(runs)


def of(cells, role):
    return [c for c in cells if c.role == role]


def test_a_grid_has_one_stage_per_budget_and_only_the_first_is_exact(grid):
    assert [s.exact for s in grid.stages] == [True, False, False, False, False]
    assert all(len(of(s.cells, "grid")) == 5 for s in grid.stages)
    assert grid.low <= sum(c.cost for c in grid.cells) <= grid.high <= grid.cap
    first = grid.stages[0]
    spare = 2 * (first.cells[0].cost + first.cells[4].cost)
    assert first.high == pytest.approx(first.low + spare), (
        "two more rates for each of the two sweeps"
    )


def test_cells_spend_their_budget_in_exact_flops(grid):
    for c in grid.cells:
        exact = c.tokens * flops_per_token(c.shape.model, 256, causal=True)
        assert c.flops["causal"] == exact == c.cost
        assert c.tokens == c.steps * c.global_batch * 256
        assert c.cost == pytest.approx(c.budget, rel=0.02)
        assert c.global_batch % c.micro_batch == COMMON.micro_batch % c.micro_batch == 0


def test_sizes_lie_on_both_sides_of_twenty_tokens_a_parameter(grid):
    for s in grid.stages:
        ratios = [c.tokens / c.shape.parameters for c in of(s.cells, "grid")]
        assert ratios == sorted(ratios, reverse=True)
        assert ratios[0] > 100 > 20 / 5 > ratios[-1]
        assert ratios[2] == pytest.approx(20, rel=0.25)


def test_both_ends_of_a_budget_have_three_rates_and_the_others_wait_for_them(grid):
    for s in grid.stages:
        sizes = of(s.cells, "grid")
        tried = {c.shape.parameters: c.learning_rate for c in of(s.cells, "rate")}
        assert set(tried) == {sizes[0].shape.parameters, sizes[-1].shape.parameters}
        for end in (sizes[0], sizes[-1]):
            cells = [c for c in of(s.cells, "rate") if c.shape == end.shape]
            rates = sorted(c.learning_rate / end.learning_rate for c in cells)
            assert rates == [0.5, 2.0]
            assert not end.waits_for
        assert all(len(c.waits_for) == 6 for c in sizes[1:-1])


def test_batches_are_swept_at_the_lowest_and_the_highest_budget(grid):
    assert [len(of(s.cells, "batch")) > 0 for s in grid.stages] == [True, *[False] * 3, True]
    high = grid.stages[-1]
    middle = of(high.cells, "grid")[2].global_batch
    assert sorted(c.global_batch / middle for c in of(high.cells, "batch")) == pytest.approx(
        [0.5, 2], rel=0.25
    )


def test_repeats_are_at_the_cheapest_budget_and_at_the_last_but_one(grid):
    seeds = [of(s.cells, "seed") for s in grid.stages]
    assert [len(each) for each in seeds] == [SEEDS[0] - 1, 0, 0, SEEDS[1] - 1, 0]
    for cells in (seeds[0], seeds[3]):
        pairs = {(c.keys["train.seed"], c.keys["train.init_seed"]) for c in cells}
        assert len(pairs) == len(cells)
        apart = [(seed == COMMON.seed, init == COMMON.seed) for seed, init in pairs]
        assert apart.count((True, False)) == apart.count((False, True)) == len(cells) / 2
        assert {c.cell_of for c in cells} == {cells[0].name.rpartition("-")[0]}


def test_names_are_unique_and_cells_wait_for_existing_cells(grid, rungs):
    for plan in (grid, rungs):
        names = [c.name for c in plan.cells]
        assert len(set(names)) == len(names)
        for c in plan.cells:
            assert set(c.waits_for) | ({c.trunk} - {None}) <= set(names)


def test_the_keys_of_a_cell_compose_into_a_job_of_its_length(rungs):
    cells = rungs.cells
    branch = next(c for c in cells if c.trunk)
    for c in (cells[0], of(cells, "rate")[0], of(cells, "seed")[0], branch):
        values = {k: "null" if v is None else f"'{v}'" for k, v in c.keys.items()}
        values |= {k: str(v) for k, v in c.keys.items() if isinstance(v, int | float)}
        job = compose(
            TrainJob, ["model=tiny", "schedule=wsd", *(f"{k}={v}" for k, v in values.items())]
        )
        assert not job.problems(1)
        assert job.total_steps * job.tokens_per_step == c.tokens
        assert job.steps_of(job.schedule.decay) == c.decay_steps
        assert job.model.resolved(512, 256) == c.shape.model
        assert job.run.origin.run == c.trunk


def test_a_plan_of_an_earlier_version_is_read(grid):
    facts = json.loads(json.dumps(dump(grid)))
    facts["common"]["aspect"] = {"layers": 12.0, "width": 768.0, "exponent": 0.75}
    for cell in (cell for stage in facts["stages"] for cell in stage["cells"]):
        cell |= {"seconds": None, "adam_share": None}
        del cell["shares"]
        cell["shape"]["wanted"] = cell["shape"].pop("target")
    assert load(facts) == grid
    facts["common"]["adam_share"] = 2.0
    assert load(facts).common.shares == (("optimizer.adam_learning_rate", 2.0),)


@pytest.mark.slow  # seconds
def test_doubtful_cells_are_flagged():
    few = replace(COMMON, unique=1e6, micro_batch=128)
    flags = {f for c in isoflop(few).cells for f in c.flags}
    assert "fewer than 500 steps" in flags
    assert "D beyond one epoch" in flags
    assert "warm-up of fewer than 20 steps" in flags
    assert "batch and learning rate outside the range of their rule" in flags
    large = Common(ModelConfig(depth=12), 50_304, 2048, micro_batch=64)
    big = isoflop(large, 1.5e21, budgets=3, step=2.0)
    inner = [c for c in of(big.cells, "grid") if c.name[-1] in "123"]
    assert not any("beyond" in f or "outside" in f for c in inner for f in c.flags)
    assert big.notes


def test_the_next_stage_is_centred_at_the_found_optimum(grid):
    once = grid.centre_next_stage(lambda c: 4e5)
    assert [s.exact for s in once.stages] == [True, True, False, False, False]
    assert of(once.stages[1].cells, "grid")[2].shape.parameters == pytest.approx(4e5, rel=0.12)
    assert once.stages[0] is grid.stages[0]
    assert once.stages[1].low == sum(c.cost for c in once.stages[1].cells) < once.stages[1].high
    plan = grid
    for _ in range(4):
        plan = plan.centre_next_stage(lambda c: 0.06 * c**0.5)
    assert all(s.exact for s in plan.stages)
    with pytest.raises(UserError, match="all stages are exact"):
        plan.centre_next_stage(lambda c: 4e5)
    with pytest.raises(UserError, match="no size"):
        grid.centre_next_stage(lambda c: float("nan"))


def test_sizes_around_a_very_small_optimum_begin_at_the_smallest_model(grid):
    """A cheap budget's best model may be the smallest there is; the study goes on."""
    planned = grid.centre_next_stage(lambda c: 100.0).stages[1]
    sizes = [c.shape.parameters for c in of(planned.cells, "grid")]
    assert sizes[0] == COMMON.family.smallest
    assert len(sizes) >= 4


def test_the_cost_of_an_exact_stage_is_within_the_range_of_its_draft(grid):
    for factor in (0.6, 1.0, 1.7):
        planned = grid.centre_next_stage(lambda c, f=factor: COMMON.centre(c) * f).stages[1]
        was = grid.stages[1]
        assert was.low * 0.99 <= planned.low <= was.high * 1.01


@pytest.mark.slow  # a plan of a whole study
def test_a_plan_above_the_cap_is_refused_with_one_that_fits(grid):
    with pytest.raises(UserError, match=r"no grid can start at .* FLOPs \(N: "):
        isoflop(cap=1e9)
    with pytest.raises(UserError, match=r"3 sizes .* and fit"):
        ladder(cap=1.5e14)
    with pytest.raises(UserError, match="remove runs"):
        listed([(n, 20 * n) for n in SIZES], 1e10)
    cut = replace(grid, cap=grid.high * 0.9)
    with pytest.raises(UserError, match="end this one here"):
        cut.centre_next_stage(lambda c: 4e5)


@pytest.mark.parametrize("budgets", [3, 5, 7])
def test_budgets_within_a_cap_use_it_up(budgets):
    plan = isoflop(budgets=budgets)
    assert 0.9e16 < plan.high <= 1e16
    assert len(plan.stages) == budgets


def test_a_ladder_is_sizes_times_multiples(rungs):
    cells = of(rungs.cells, "grid")
    assert len(cells) == 16
    ratios = sorted({round(c.tokens / c.shape.parameters) for c in cells})
    assert ratios == [10, 20, 40, 80]


def test_branches_cost_their_decay_alone(rungs):
    longest = {c.name: c for c in of(rungs.cells, "grid") if c.name.endswith("-x4")}
    branches = [c for c in rungs.cells if c.trunk]
    assert len(branches) == 10  # all but the longest ones and two swept sizes
    for c in branches:
        trunk = longest[c.trunk]
        assert c.shape == trunk.shape
        assert c.trunk_step + c.decay_steps == c.steps
        assert c.trunk_step <= trunk.steps - trunk.decay_steps
        assert c.trunk_step >= c.warmup_steps == trunk.warmup_steps
        assert c.cost == pytest.approx(0.2 * c.flops["causal"], rel=0.01)
        assert c.keys["run.from.step"] == c.trunk_step
    alone = sum(c.flops["causal"] for c in of(rungs.cells, "grid"))
    shared = sum(c.cost for c in of(rungs.cells, "grid"))
    assert shared < 0.75 * alone


def test_runs_with_other_seeds_share_no_trunk(rungs):
    assert len(of(rungs.cells, "seed")) == SEEDS[0] - 1 + SEEDS[1] - 1
    assert not any(c.trunk for c in of(rungs.cells, "seed"))
    assert share_trunks(of(rungs.cells, "seed"))[0].cost == of(rungs.cells, "seed")[0].cost


def test_a_list_has_the_given_runs():
    runs = [(n, m * n) for n in SIZES for m in (20, 60)]
    plan = listed(runs)
    cells = of(plan.cells, "grid")
    assert [c.tokens for c in cells] == pytest.approx([d for _, d in runs], rel=0.02)
    assert [c.trunk is not None for c in cells] == [True, False] * 4


def test_learning_rates_are_chosen_by_the_losses_of_the_sweeps(grid):
    stage = grid.stages[0]
    sizes = of(stage.cells, "grid")
    best = {c.shape.parameters: 12e-3 * (sizes[0].shape.parameters / c.shape.parameters) ** 0.2
            for c in sizes}  # fmt: skip
    losses = {
        c.name: 3 * np.exp(0.01 * np.log(c.learning_rate / best[c.shape.parameters]) ** 2)
        for c in stage.cells
    }
    planned = stage.with_rates("", *best_of_sizes(stage, losses))
    for c in of(planned.cells, "grid")[1:-1]:
        assert c.learning_rate == pytest.approx(best[c.shape.parameters], rel=1e-6)
    assert [c.cost for c in planned.cells] == [c.cost for c in stage.cells]
    assert 0 < planned.gap < 0.01 * np.log(2) ** 2
    assert not any(c.waits_for for c in planned.cells)
    assert planned.high == planned.cost, "the reserve for extra rates is free again"


def test_a_best_rate_at_an_edge_adds_the_next_rate(grid):
    stage = grid.stages[0]
    losses = {c.name: 3 - 0.1 * np.log(c.learning_rate) for c in stage.cells}
    best, _ = best_of_sizes(stage, losses)
    swept = stage.sweep("")
    extra = extra_rates(swept, best, 2, room=stage.high - stage.cost)
    assert [c.learning_rate for c in extra] == pytest.approx([4e-2, 4e-2])
    assert {c.cell_of for c in extra} == {"s1-n0", "s1-n4"}
    assert not extra_rates(swept, best, 2, room=0.0), "not above the cap"
    wide = stage.with_extra_rates("", extra)
    losses |= {c.name: 9.0 for c in extra}
    best, _ = best_of_sizes(wide, losses)
    assert {c.name for c in extra} <= {c.name for c in wide.sweep("")}
    assert not extra_rates(wide.sweep(""), best, 2, room=1e30), "the best is inside now"


def test_a_trunk_keeps_the_checkpoints_of_its_branches(rungs):
    for c in rungs.cells:
        cells = sorted(o.trunk_step for o in rungs.cells if o.trunk == c.name)
        assert list(c.branches) == cells
        assert c.keys.get("checkpoint.at", []) == cells


@pytest.mark.parametrize(
    ("planned", "message"),
    [
        (lambda: isoflop(sizes=7, spread=1.05), "only 2 different models"),
        (lambda: isoflop(replace(COMMON, vocab_size=None)), "vocab_size"),
        (lambda: ladder([1e5, 2e5]), "determine no law"),
        (lambda: ladder(multiples=[1]), "determine no law"),
        (lambda: listed([(1e5, 1e6)] * 4), "three or more sizes"),
    ],
)
def test_impossible_plans_are_refused(planned, message):
    with pytest.raises(UserError, match=message):
        planned()


def test_a_joint_sweep_has_three_rates_at_each_batch():
    grid = isoflop(replace(COMMON, joint_sweep=True, micro_batch=2), 8e15)
    for stage in (grid.stages[0], grid.stages[-1]):
        tried = [c for c in stage.cells if c.role in ("batch", "rate-batch")]
        (cells,) = {c.cell_of for c in tried}
        middle = next(c for c in stage.cells if c.name == cells)
        assert len(tried) == 8
        assert {c.rate_factor for c in tried} == {0.5, 1.0, 2.0}
        assert len({c.global_batch for c in tried} | {middle.global_batch}) == 3
        assert all(c.waits_for == middle.waits_for for c in tried)
        losses = {c.name: 3.0 + np.log(c.learning_rate / 5e-3) ** 2 for c in stage.cells}
        best = best_of_sizes(stage, losses)
        planned = {c.name: c for c in stage.with_rates("", *best).cells}
        for c in tried:
            rate = planned[cells].learning_rate * c.rate_factor
            assert planned[c.name].learning_rate == pytest.approx(rate)
