"""Recipes: each of the project's own is one that `train` takes, and none sets what a cell sets."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from forescale.config.compose import CONF, compose
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.scaling.config import PlanKeys, StudyJob
from forescale.scaling.design.kinds import STUDY_KEYS, highest_seeds, recipes_plan
from forescale.scaling.design.recipes import BASE, read_recipes, recipes_of
from forescale.scaling.design.shapes import Common

SHARED = PlanKeys().shared
CANDIDATES = [
    name for name in yaml.safe_load((CONF / "candidates.yaml").read_text()) if name != "gpt2"
]


def recipes(**named):
    return recipes_of(SHARED, {BASE: [], **named}, STUDY_KEYS)


@cache
def planned(*arguments, beyond=1):
    """The plan of the base and a recipe `new`. beyond: budgets of the base alone at the top."""
    common = Common(compose(TrainJob, SHARED).model, 257, 64, seeds=(2, 2))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "own.yaml"
        file.write_text(yaml.safe_dump({"new": list(arguments)}))
        keys = PlanKeys(8e12, "recipes", ["new"], recipes=str(file), budgets=3, step=2.0)
        keys.fresh, keys.beyond, keys.sizes, keys.dials = 1, beyond, 1, []
        return recipes_plan(StudyJob(plan=keys), common)


@pytest.mark.parametrize("name", CANDIDATES)
def test_each_of_our_candidates_is_a_recipe_over_gpt2(name):
    named = read_recipes(None, ["gpt2"], [name])
    base, one = recipes_of(SHARED, named, STUDY_KEYS)
    assert one.arguments[: len(base.arguments)] == base.arguments
    assert one != base


@pytest.mark.parametrize(
    "text", ["model.width=64", "model.num_layers=2", "model.depth=2", "+model.width=64"]
)
def test_layers_and_width_of_a_recipe_are_refused(text):
    with pytest.raises(UserError, match=r"recipe new: model\.\w+ is set by the study itself"):
        recipes(new=[text])


def test_a_recipe_with_a_first_batch_in_windows_is_refused():
    with pytest.raises(UserError, match=r"recipe new: train\.first_batch is a number of windows"):
        recipes(new=["train.first_batch=4", "train.batch_ramp='9 steps'"])
    for wrong in ("0.3", "2", "0", "one"):
        with pytest.raises(UserError, match=r"recipe new: first_batch=.* is n"):
            recipes(new=[f"first_batch={wrong}"])


def cells_of(recipe, *arguments):
    """The planned runs of a recipe by what tells them apart."""
    cells = [c for c in planned(*arguments).cells if c.recipe == recipe]
    return {(c.stage, c.role, c.seed, c.rate_factor): c for c in cells}


def test_a_batch_that_grows_pays_for_as_many_tokens_and_decays_over_as_many():
    """What `train` makes of its cells' keys has their steps, tokens and batches: a quarter at
    first, full after a fifth of the tokens."""
    base, growing = cells_of(BASE), cells_of("new", "first_batch=0.25")
    assert len({c.steps for c in growing.values()}) == 3
    for run, cell in growing.items():
        like, step = base[run], cell.global_batch * cell.sequence_length
        assert like.tokens <= cell.tokens < like.tokens + step
        assert (cell.global_batch, cell.decay_steps) == (like.global_batch, like.decay_steps)
        keys = {k: "null" if v is None else v for k, v in cell.keys.items()}
        job = compose(TrainJob, [*SHARED, *(f"{k}={v}" for k, v in keys.items())])
        assert not [key for key, _, _ in job.problems() if key.startswith("train.")]
        assert (job.total_steps, job.total_tokens) == (cell.steps, cell.tokens)
        ramp = job.batch_ramp
        assert (ramp.first, ramp.full) == (cell.global_batch // 4, cell.global_batch)
        assert ramp.samples(ramp.steps) / job.total_windows == pytest.approx(0.2, abs=0.02)
        warm = like.warmup_steps * like.global_batch
        assert ramp.samples(cell.warmup_steps) == pytest.approx(warm, abs=ramp.full)


def test_a_small_batch_is_fed_in_smaller_parts():
    """The base's batch is what is fed at once: half of it is a batch too, and one of eight windows
    the least."""
    base = cells_of(BASE)
    for factor, windows in ((0.5, 4), (0.125, 1)):
        cells = cells_of("new", f"batch={factor}")
        assert {c.micro_batch for c in cells.values()} == {windows}
        shares = {cells[run].global_batch / base[run].global_batch for run in cells}
        assert shares == {factor}
    with pytest.raises(UserError, match=r"recipe new: plan\.micro_batch of 8 windows makes no"):
        planned("batch=0.0625")


def test_groups_of_heads_are_kept_at_every_budget():
    """One of two heads has keys and values, so half of them at any size."""
    models = [c.shape.model for c in planned("model.num_kv_heads=1").cells if c.recipe == "new"]
    assert {m.num_heads / m.num_kv_heads for m in models} == {2.0}


def test_a_recipe_whose_sizes_come_out_as_the_bases_is_named():
    assert any("new has the sizes" in note for note in planned("model.num_heads=4").notes)
    assert not any("new" in note for note in planned("model.num_kv_heads=1").notes)


def test_sizes_without_a_ratio_are_refused_by_the_name_of_their_recipe():
    with pytest.raises(UserError, match=r"recipe new: model\.num_heads of the base model has no"):
        planned("model.num_heads=6", "model.head_dim=64")


def test_more_budgets_of_the_base_alone_are_within_the_same_cap():
    """Each is 2.5 times the one before; what wins at the highest budget of all is confirmed."""
    far = planned(beyond=2)
    alone = [s for s in far.stages[:-1] if {c.recipe for c in s.cells} == {BASE}]
    assert [s.number for s in alone] == [1, 5, 6]
    assert alone[2].budget == pytest.approx(2.5 * alone[1].budget)
    assert alone[1].budget == pytest.approx(2.5 * far.stages[3].budget)
    assert {c.stage for c in highest_seeds(far).values()} == {4}
    assert far.high <= far.cap == planned().cap


@pytest.mark.slow  # seconds
def test_a_plan_whose_runs_cost_more_than_their_budgets_is_refused_above_the_cap():
    """A run has one step at least: that of a huge batch is far more than its budget pays for."""
    with pytest.raises(UserError, match=r"plan\.cap: the plan costs up to .*: b4-new.* costs "):
        planned("batch=10000")
    costs = {c.recipe: c.cost for c in planned().stages[-3].cells if c.role == "grid"}
    assert planned().stages[-1].high == 5 * sum(costs.values()) - 4 * costs["base"]
    assert planned().high <= planned().cap
