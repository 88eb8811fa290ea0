"""The work of a micro-batch: the roofs that bind it, by hand for a small model."""

from dataclasses import replace

import pytest

from forescale.config.compose import compose
from forescale.config.sections.lora import LoraConfig
from forescale.models.flops import flops_per_token
from forescale.plan.bytes.parameters import inventory
from forescale.plan.config import PlanJob
from forescale.plan.work import work_of

BLOCKS, LOSS = 24, 10  # bytes of traffic per kept byte, not compiled
SIZES = ["model=gpt2-124m", "train.steps=10", "train.sequence_length=1024", "schedule.warmup=0"]
SCORES = 12 * 2 * 768 * 1025  # forward FLOPs of a token: 12 layers, a causal half of the square
TOKENS = 4 * 1024
ADAPTERS = LoraConfig(rank=8)
TWO = ["plan.gpus=2", "train.compile=off"]


def job(*words):
    planned = compose(PlanJob, [*SIZES, "train.micro_batch=4", *words])
    vocabulary = planned.model.vocab_size
    return replace(planned, model=planned.model.resolved(vocabulary, planned.train.sequence_length))


def work(*words):
    planned = job(*words)
    estimate = work_of(planned, inventory(planned).of_rank(planned.mesh(1)).numel, planned.mesh(1))
    assert estimate is not None
    return estimate


def test_products_and_scores_are_the_flops_of_a_causal_model():
    planned = job("model.loss_chunk=0")
    estimate = work("model.loss_chunk=0")
    whole = flops_per_token(planned.model, 1024, causal=True)
    assert estimate.scores == TOKENS * SCORES * 3.5  # backward: 5 products where forward has 2
    assert estimate.products == pytest.approx(TOKENS * (whole - 3 * SCORES))


def test_what_is_computed_again_is_counted():
    plain, again = work("model.loss_chunk=0"), work("model.activation_checkpointing=full")
    matrices = 12 * 2 * 12 * 768**2  # of the blocks, forward
    head = 2 * 768 * 50257  # of the loss in chunks
    assert again.products - plain.products == pytest.approx(TOKENS * (matrices + head))
    assert again.scores / plain.scores == pytest.approx(4.5 / 3.5)
    assert again.traffic > plain.traffic
    assert again.weights == pytest.approx(plain.weights * 4 / 3)


def test_adapters_are_computed_again_too():
    jobs = [
        replace(job("model.loss_chunk=0", f"model.activation_checkpointing={how}"), lora=ADAPTERS)
        for how in ("none", "full")
    ]
    plain, again = (work_of(one, 0, one.mesh(1)) for one in jobs)
    sides = 4 * (768 + 768) + 2 * (768 + 4 * 768)  # inputs and outputs of a block's matrices
    matrices = 12 * 2 * (12 * 768**2 + 8 * sides)
    assert again.products - plain.products == pytest.approx(TOKENS * matrices, rel=1e-12)


@pytest.mark.parametrize(
    "words",
    [
        ["model.mlp=moe", "model.bias=false"],
        ["model.encoder_layers=2", "objective=seq2seq", "model.source_length=838"],
        ["model.mixer=gated_deltanet"],
        ["model.mtp_layers=1"],
    ],
)
def test_products_and_scores_add_up_for_other_models(words):
    planned = job(*words, "model.loss_chunk=0")
    estimate = work(*words, "model.loss_chunk=0")
    whole = flops_per_token(planned.model, 1024, causal=True)
    scores = estimate.scores / 3.5
    assert 0 < scores < estimate.products / 3
    assert estimate.products / 3 + scores == pytest.approx(TOKENS * whole / 3, rel=0.02)


def test_seconds_are_those_of_the_three_roofs():
    machine = replace(
        job().machine, efficiency=0.5, attention_efficiency=0.1, memory_bandwidth=1e12
    )
    estimate = work()
    products, scores, traffic = (
        estimate.products / 0.5e15,
        estimate.scores / 0.1e15,
        estimate.traffic / 1e12,
    )
    scores *= 1 + 500 / 1024  # short sequences attend slowly
    order = 0.4 * 2.5 / 3.5  # of the backward pass, which adds in one order
    free = work("train.deterministic=false")
    assert free.seconds(machine, 1e15) == pytest.approx(products + scores + traffic)
    scores *= 1 + order
    assert estimate.seconds(machine, 1e15) == pytest.approx(products + scores + traffic)
    blind = replace(machine, memory_bandwidth=None, attention_efficiency=None)
    assert estimate.seconds(blind, 1e15) == pytest.approx(products + scores / 5)
    # At an endless peak, weights and activations still pass through the memory.
    bound = (estimate.weights + estimate.traffic) / 1e12
    assert estimate.seconds(machine, 1e30) == pytest.approx(bound)
    # In an endless memory, a host still launches the kernels of 12 compiled blocks.
    launching = replace(machine, memory_bandwidth=1e30, launch=1e-5)
    assert estimate.seconds(launching, 1e30) == pytest.approx(12 * 30 * 1e-5)
    assert estimate.seconds(launching, 1e15) == pytest.approx(products + scores)


@pytest.mark.parametrize("again", ["none", "full"])
def test_the_matrices_of_blocks_take_half_the_time_in_fp8(again):
    words = [f"model.activation_checkpointing={again}", "model.loss_chunk=0", "model.bias=false"]
    plain, tensors, rows = (
        work(*words, f"precision.fp8={kind}") for kind in ("none", "tensorwise", "rowwise")
    )
    passes = 4 / 3 if again == "full" else 1
    assert tensors.fp8 == rows.fp8 == pytest.approx(TOKENS * 6 * 12 * 12 * 768**2 * passes)
    assert (tensors.traffic, plain.fp8) == (plain.traffic, 0)
    machine = replace(job().machine, efficiency=0.5, memory_bandwidth=None)
    saved = plain.seconds(machine, 1e15) - tensors.seconds(machine, 1e15)
    assert saved == pytest.approx(tensors.fp8 / 2 / 0.5e15)
    values = 12 * 768 * (4 * 2 + 2 * 5)  # inputs and outputs of 4 matrices and of 2 of the MLP
    assert rows.traffic - plain.traffic == pytest.approx(18 * TOKENS * values * passes)


def test_compiled_code_passes_less_through_the_memory():
    assert work("train.compile=on").traffic < 0.7 * work("train.compile=off").traffic


def test_ranks_that_divide_columns_each_read_all_weights():
    one, two = (work(f"engine.sequence_parallel={n}", *TWO) for n in (1, 2))
    assert (two.products, two.scores) == pytest.approx((one.products / 2, one.scores / 2))
    assert two.weights == one.weights
    # Attention's output comes back from the heads of others, and is kept once more.
    returned = BLOCKS * TOKENS / 2 * 12 * 768 * 2
    assert two.traffic == pytest.approx(one.traffic / 2 + returned)


@pytest.mark.parametrize(("vocabulary", "head"), [(50258, 1 / 2), (50257, 1)])
def test_ranks_that_divide_matrices_have_the_stream_whole(vocabulary, head):
    """And the head, where they don't divide its rows."""
    words = ["model.loss_chunk=0", f"model.vocab_size={vocabulary}", "optimizer=adamw"]
    words += TWO
    one, two = (work(f"engine.tensor_parallel={n}", *words) for n in (1, 2))
    rows = head * vocabulary
    matrices = 12 * 12 * 768**2 / 2  # of the blocks, without biases
    assert two.products == pytest.approx(TOKENS * 6 * (matrices + 768 * rows))
    assert two.scores == one.scores / 2
    # Inputs (4 bytes) and outputs (2) of two norms a layer, on each rank; of the head 8 a logit.
    norms = 12 * 2 * 768 * (4 + 2)
    loss = LOSS * 8 * vocabulary
    inside = (one.traffic / TOKENS - loss) / BLOCKS - norms
    expected = BLOCKS * (norms + inside / 2) + LOSS * 8 * rows
    assert two.traffic == pytest.approx(TOKENS * expected)
    assert one.weights / 2 < two.weights < one.weights * (0.66 if head == 1 else 0.51)
