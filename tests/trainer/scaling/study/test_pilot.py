"""A pilot finds sizes, batch and learning rate before the first run of the law."""

import math
from dataclasses import replace

import pytest

from forescale import cli
from forescale.scaling.design.pilot import with_batch
from forescale.scaling.design.tuning import RateBatchResponse
from forescale.scaling.study.decisions import advance
from forescale.scaling.study.directory import Study
from tests.trainer.scaling import fake_training
from tests.trainer.scaling.fake_training import simulated_loss, train

LENGTH, BEST_BATCH = 32, 16.0  # tokens of a window; windows
PLAN = [
    *("plan.pilot=true", "plan.budgets=3", "plan.sizes=3", "plan.cap=1e15", "plan.ratio=2"),
    *(f"plan.sequence_length={LENGTH}", "bootstraps=100"),
]


def loss_with_batch(row) -> float:
    """A batch of 16 windows is best, and the best rate grows with the root of the batch."""
    off = math.log(row["batch_tokens"] / LENGTH / BEST_BATCH)
    moved = {**row, "learning_rate": row["learning_rate"] / math.exp(off / 2)}
    return simulated_loss(moved) * math.exp(0.005 * off**2)


@pytest.fixture(scope="module")
def piloted(small_data, tmp_path_factory):
    """The plan as it was made, the study after its pilot, and what was logged."""
    root = tmp_path_factory.mktemp("pilot")
    shared = ["--", f"data.path={small_data}", "optimizer=adamw", "validation.every=100 %"]
    assert cli.main(["study", "plan", f"studies={root}", "study=small", *PLAN, *shared]) == 0
    study, lines = Study(root / "small"), []
    planned = study.plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_training, "simulated_loss", loss_with_batch)
        for _ in range(8):  # sizes at both ends, more of their rates, all others
            for cell in study.unfinished():
                if cell.stage == 0:
                    train(study.arguments(cell))
            advance(study, lines.append)
    return planned, Study(root / "small"), lines


def test_the_pilot_is_the_first_stage_within_the_cap(piloted):
    planned, _, _ = piloted
    assert [s.number for s in planned.stages] == [0, 1, 2, 3]
    assert [s.exact for s in planned.stages] == [True, False, False, False]
    assert planned.high <= planned.cap
    sizes = [c.shape.parameters for c in planned.stage(0).cells if c.role == "pilot"]
    later = [c.shape.parameters for c in planned.stage(1).cells if c.role == "grid"]
    assert min(sizes) <= min(later)
    assert max(sizes) > 2 * max(later)


def test_later_runs_have_the_batch_and_the_rate_that_it_found(piloted):
    planned, study, lines = piloted
    rule = planned.common.rule
    assert any("The pilot found a batch of 1" in line for line in lines), lines
    stage = study.plan.stage(1)
    assert stage.exact
    for cell in stage.cells:
        if cell.role == "grid":
            assert 0.2 < cell.global_batch * LENGTH / rule.batch(cell.tokens) < 0.7
            assert cell.global_batch % cell.micro_batch == 0
    swept = {c.cell_of for c in stage.cells if c.role == "rate"}
    for cell in (c for c in stage.cells if c.name in swept):
        aim = fake_training.best_rate(cell.shape.parameters)
        aim *= (cell.global_batch / BEST_BATCH) ** 0.5
        assert cell.learning_rate == pytest.approx(aim, rel=0.4)


def test_the_first_sizes_are_around_the_optimum_of_the_pilot(piloted):
    planned, study, _ = piloted
    sizes = [c.shape.parameters for c in study.plan.stage(1).cells if c.role == "grid"]
    runs = study.table()
    pilot = runs[runs["role"] == "pilot"]
    best = pilot.loc[pilot["loss"].idxmin(), "parameters_blocks_and_head"]
    assert min(sizes) < best < max(sizes)
    assert sizes != [c.shape.parameters for c in planned.stage(1).cells if c.role == "grid"]


@pytest.mark.parametrize(("inside", "of_rate"), [(True, 3.0), (False, 0.5)])
def test_a_best_batch_at_an_end_says_nothing_of_the_rate(piloted, inside, of_rate):
    """Rates then follow the square root of the batch."""
    planned, _, _ = piloted
    middle = next(c for c in planned.stage(0).cells if c.role == "pilot")
    best = RateBatchResponse(
        3 * middle.learning_rate, middle.global_batch / 4, inside, () if inside else ("batch",), 0.0
    )
    rule = with_batch(planned.common, middle, best).rule
    n, d = middle.shape.counts.non_embedding, 1e12
    before = replace(planned.common.rule, highest=1e9).learning_rate(n, d)
    assert replace(rule, highest=1e9).learning_rate(n, d) == pytest.approx(of_rate * before)
    assert rule.batch(d) == pytest.approx(planned.common.rule.batch(d) / 4)
    larger = with_batch(planned.common, middle, replace(best, batch=4 * middle.global_batch)).rule
    assert larger.batch(1e4) == pytest.approx(4 * planned.common.rule.batch(1e4))  # its least


def test_no_law_is_fitted_to_the_pilot(piloted):
    _, study, _ = piloted
    assert not study.table()["fitted"].any()
