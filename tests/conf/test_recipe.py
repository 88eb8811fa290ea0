"""The files of conf/recipe: each trains a published model, fits GPUs, and is laid under what a
command says."""

import re
from pathlib import Path

import pytest

from forescale.config.compose import CONF, compose
from forescale.config.train import TrainJob
from forescale.plan.config import PlanJob
from forescale.plan.plan import Plan
from forescale.plan.published import published_notes

# By recipe: GPUs of 80 GB, the tokens of a step, and those of the run in billions, as published.
PUBLISHED = {
    "bert-base": (8, 256 * 512, 131),
    "gpt2-124m": (8, 491_520, 295),
    "gpt2-350m": (8, 2**19, 300),
    "llama-160m": (8, 2**21, 300),
    "llama-1b": (8, 2**21, 3000),
    "llama-3b": (8, 2**22, 4006),
    "llama-7b": (8, 2**22, 1000),
    "llama-13b": (8, 2**22, 1000),
    "llama-70b": (64, 2**22, 2000),
    "mixtral-8x7b": (64, 2**22, 2000),
    "llama-405b": (8192, 2**24, 15600),
    "deepseek-v3": (2048, 15360 * 4096, 14800),
    "t5-small": (8, 128 * 624, 42),
}
MANUAL = Path(__file__).parents[2] / "conf" / "README.md"
OF_NO_PAPER = {"tiny", "fast-learner", "depth", "custom", "transformers"}


def test_every_published_model_has_a_recipe_of_its_name():
    models = {path.stem for path in (CONF / "model").glob("*.yaml")} - OF_NO_PAPER
    recipes = {path.stem for path in (CONF / "recipe").glob("*.yaml")} - OF_NO_PAPER
    assert PUBLISHED.keys() == recipes == models


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_fits_its_gpus_and_is_near_what_was_published(name):
    gpus, step_tokens, billions = PUBLISHED[name]
    job = compose(PlanJob, [f"recipe={name}", f"plan.gpus={gpus}", "data=bytes"])
    assert job.tokens_per_step == step_tokens
    assert round(job.total_steps * step_tokens / 1e9) == billions
    assert job.optimizer.kind == "adamw"
    plan = Plan(job)
    assert not plan.problems
    active = plan.parameters.get("active", plan.parameters["total"])
    assert published_notes(plan.job, active) == []
    assert not [note for note in plan.notes if "checkpointing could be off" in note]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_no_division_of_its_gpus_is_much_faster_than_a_recipe_s(name):
    plan = Plan(compose(PlanJob, [f"recipe={name}", f"plan.gpus={PUBLISHED[name][0]}"]))
    assert plan.chosen.step.seconds < 1.05 * plan.divisions[0].seconds


def test_the_manual_s_table_has_the_numbers_of_the_files():
    rows = [row.split("|")[1:-1] for row in MANUAL.read_text().splitlines() if row.startswith("|")]
    recipes = set()
    for names, _, step, tokens, rate, gpus in (row for row in rows if len(row) == 6):
        for name in re.findall(r"`([\w-]+)`", names):
            job = compose(TrainJob, [f"recipe={name}"])
            assert job.optimizer.learning_rate == float(rate)
            assert int(gpus) == PUBLISHED[name][0]
            batch = job.tokens_per_step / 1e6
            assert float(step.strip().rstrip("M")) == pytest.approx(batch, abs=0.05)
            billions = float(tokens.strip()[:-1]) * {"B": 1, "T": 1000}[tokens.strip()[-1]]
            assert billions == pytest.approx(PUBLISHED[name][2], rel=0.01)
            recipes.add(name)
    assert recipes == PUBLISHED.keys()


def test_t5_s_recipe_reads_windows_of_t5_s_length():
    plan = Plan(compose(PlanJob, ["recipe=t5-small", "plan.gpus=8"]))
    assert plan.job.model.source_length == 511  # T5 ends both parts with one token more


def test_what_is_typed_and_what_an_experiment_says_wins():
    job = compose(TrainJob, ["recipe=llama-1b", "optimizer.learning_rate=1e-4", "engine=zero3"])
    assert (job.optimizer.learning_rate, job.engine.stage) == (1e-4, 3)
    assert job.schedule.kind == "cosine"
    job = compose(
        TrainJob, ["recipe=llama-160m", "experiment=anneal", "data.sources={web: /w, fine: /f}"]
    )
    assert (job.train.tokens, job.train.steps) == (1e10, None)  # the recipe's length is in steps
    assert (job.schedule.kind, job.train.global_batch) == ("wsd", 1024)


def test_an_experiment_wins_over_a_recipe_that_is_typed_after_it():
    words = ["recipe=llama-160m", "experiment=anneal", "data.sources={web: /w, fine: /f}"]
    assert compose(TrainJob, words[::-1]) == compose(TrainJob, words)


def test_an_experiment_can_choose_a_recipe_and_the_command_line_another():
    words = ["experiment=gpus64", "data.path=/data/web"]
    assert compose(TrainJob, words).model.width == 4096
    job = compose(TrainJob, [*words, "recipe=llama-13b"])
    assert (job.model.width, job.guard.loss_spike) == (5120, "rollback")


def test_a_length_that_is_typed_replaces_the_recipe_s():
    job = compose(TrainJob, ["recipe=bert-base", "train.tokens=1e9"])
    assert (job.train.tokens, job.train.steps) == (1e9, None)
