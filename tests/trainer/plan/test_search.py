"""The best ways to divide a job: each is accepted, fits, and takes the time that is said."""

from itertools import product

import pytest

from forescale.config.compose import compose
from forescale.plan.config import PlanJob
from forescale.plan.plan import Plan

SHORT = ["train.steps=10", "schedule.warmup=0"]
JOBS = {
    "dense": ["recipe=llama-7b", "plan.gpus=64"],
    "experts": ["model=llama-160m", "model.mlp=moe", "plan.gpus=16", "train.global_batch=64",
                *SHORT],
    "encoder-decoder": ["recipe=t5-small", "plan.gpus=8"],
    "three GPUs, Muon": ["model=tiny", "optimizer=muon", "plan.gpus=3", "train.global_batch=12",
                         "train.micro_batch=1", *SHORT],
    "a state, later tokens": ["model=llama-160m", "model.mixer=gated_deltanet", "plan.gpus=8",
                              "model.mtp_layers=1", "train.global_batch=64", *SHORT],
    "invariant": ["model=llama-160m", "train.invariant=true", "plan.gpus=16",
                  "train.global_batch=48", "train.micro_batch=1", *SHORT],
    "offload": ["recipe=llama-1b", "engine=zero2-offload", "plan.gpus=8", "train.micro_batch=1"],
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_each_proposal_is_accepted_and_is_what_it_says(name):
    plan = Plan(compose(PlanJob, JOBS[name]))
    assert plan.divisions
    for division in plan.divisions:
        same = Plan(compose(PlanJob, [*JOBS[name], *division.words.split()]))
        assert not same.problems
        assert same.chosen.fits(same.available)
        assert same.chosen.memory.peak == division.memory.peak
        assert same.chosen.step.seconds == pytest.approx(division.seconds)
        for key in ("tokens_per_step", "total_steps"):
            assert getattr(same.job, key) == getattr(plan.job, key)


@pytest.mark.parametrize(("recipe", "gpus"), [("llama-7b", 64)])
def test_no_stage_no_micro_batch_and_no_recomputation_is_faster_than_the_best(recipe, gpus):
    words = [f"recipe={recipe}", f"plan.gpus={gpus}", "train.micro_batch=1"]
    plan, seconds = Plan(compose(PlanJob, words)), []
    for again, micro in product(("none", "full"), (1, 4)):
        how = f"model.activation_checkpointing={again}"
        same = Plan(compose(PlanJob, [*words, f"train.micro_batch={micro}", how]))
        seconds += [o.step.seconds for o in same.options if o.fits(same.available)]
    assert min(seconds) / 1.01 <= plan.divisions[0].seconds <= 1.01 * min(seconds)
    assert len({d.parts for d in plan.divisions}) == len(plan.divisions) == 5


def test_the_job_as_configured_is_named_where_nothing_is_faster():
    words = ["recipe=llama-160m", "plan.gpus=8"]
    plan = Plan(compose(PlanJob, words))
    assert plan.divisions[0].words == ""
    assert plan.divisions[0].seconds == plan.chosen.step.seconds


def test_a_speed_that_is_given_compares_no_divisions(planned):
    _, plan, _ = planned("recipe=llama-1b", "plan.gpus=8", "plan.mfu=0.4", "plan.divisions=5")
    assert plan["divisions"] == []


def test_a_job_that_fits_only_divided_is_told_how(planned):
    words = ["model=llama-7b", "engine=zero1", "plan.gpus=8", "machine.memory_bytes=24e9",
             "train.micro_batch=1", "train.sequence_length=32768", "train.global_batch=256",
             "precision=bf16", "plan.divisions=5", *SHORT]  # fmt: skip
    plan = Plan(compose(PlanJob, words))
    assert plan._options.smallest_fix(plan.job) is None
    code, plan, err = planned(*words)
    assert code == 2
    assert f"set {plan['divisions'][0]['words']}" in err


@pytest.mark.slow
def test_no_fast_ways_that_do_not_fit_end_the_search():
    plan = Plan(compose(PlanJob, ["recipe=deepseek-v3", "plan.gpus=2048"]))
    assert plan.divisions[0].seconds <= plan.chosen.step.seconds
