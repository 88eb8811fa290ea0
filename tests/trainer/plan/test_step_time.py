"""The time of a step where ranks divide windows or matrices: each does its part, and no less."""

from dataclasses import replace

import pytest

from forescale.config.compose import compose
from forescale.plan.bytes.parameters import inventory
from forescale.plan.config import PlanJob
from forescale.plan.plan import Plan
from forescale.plan.step_time import predict_step_time, token_flops

QUICK = ["experiment=quick", "optimizer=adamw", "train.micro_batch=2"]
LARGE = ["model=llama-7b", "optimizer=adamw", "train.steps=10", "schedule.warmup=0",
         "train.micro_batch=1", "train.global_batch=64", "machine=h100-sxm", "precision=bf16",
         "model.vocab_size=32000", "model.activation_checkpointing=none"]  # fmt: skip
DIVIDED = ["engine.sequence_parallel=2", "engine.tensor_parallel=2"]


def computing(ranks, *words):
    """The seconds of a step without what links take."""
    job = compose(PlanJob, [*LARGE, f"plan.gpus={ranks}", *words])
    length = job.train.sequence_length
    job = replace(job, model=job.model.resolved(32_000, length))
    price = token_flops(job.model, job.lora, length, 0.0, job.engine.sequence_parallel)
    return predict_step_time(job, inventory(job), price, [], job.machine, ranks, ranks).computing


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("length", [16, 4096])
def test_two_ranks_are_never_more_than_twice_as_fast(stage, length):
    """Those with windows of their own are, but for the update; those that share them are not."""
    words = [f"engine=zero{stage}", f"train.sequence_length={length}"]
    one = computing(1, *words)
    assert computing(2, *words) == pytest.approx(one / 2, rel=0.1 if stage == 0 else 1e-9)
    for way in DIVIDED:
        assert one / 2 < computing(2, *words, way) < 1.01 * one


def test_the_time_of_a_run_is_that_of_its_own_batches():
    words = [*LARGE, "engine=zero1", "plan.gpus=4", "train.steps=40", "plan.mfu=0.4"]
    ramp = ["train.first_batch=16", "train.batch_ramp='20 steps'"]
    whole, grown = (Plan(compose(PlanJob, [*words, *extra])) for extra in ([], ramp))
    # At a given MFU time is in proportion to tokens: 10 steps of a quarter, 10 of a half.
    assert grown.seconds / whole.seconds == pytest.approx((10 / 4 + 10 / 2 + 20) / 40)
    assert grown.chosen.step == whole.chosen.step
    assert grown.chosen.largest_micro_batch <= 16 // 4


def test_what_a_rank_reads_whole_takes_its_whole_time():
    """Windows of 16 tokens: reading weights takes longest, 64 times in a step."""
    words = ["engine=zero1", "train.sequence_length=16"]
    one = computing(1, *words)
    columns, matrices = (computing(2, *words, way) for way in DIVIDED)
    reading = 64 * 3 * 2 * 6_738_415_616 / 3.35e12  # bytes in bf16, of an H100 a second
    assert reading < one < 1.2 * reading
    assert columns > reading
    assert matrices > reading / 2


def test_a_rank_whose_columns_are_one_chunk_computes_nothing_again():
    """Windows of 256 tokens in chunks of 200: of the two ranks that divide them each has 128."""

    def recomputed(*words):
        return Plan(compose(PlanJob, [*QUICK, "plan.gpus=2", *words])).per_token.recomputed

    chunks, divided = "model.mlp.chunk=200", "engine.sequence_parallel=2"
    assert recomputed(divided, chunks) == recomputed(divided) == recomputed()
    assert recomputed(chunks) > recomputed()
    assert recomputed(divided, "model.mlp.chunk=100") == recomputed(chunks)


def test_the_price_of_invariant_sums_is_theirs_alone():
    """Rounding is done for each micro-batch, squares once, each rank for its part of them."""
    job = compose(PlanJob, [*LARGE, "engine=zero2", "plan.gpus=8", "train.invariant=true"])
    job = replace(job, model=job.model.resolved(32_000, job.train.sequence_length))
    price = token_flops(job.model, job.lora, job.train.sequence_length, 0.0)
    step = predict_step_time(job, inventory(job), price, [], job.machine, 8, 8)
    without = computing(8, "engine=zero2", "engine.gradient_dtype=fp32")
    sums = 6_738_415_616 * (8 * 9 * 2 + 116 / 8) / 3.35e12
    assert step.parts["invariant sums"] == pytest.approx(sums)
    assert step.computing == pytest.approx(without + sums)
