"""Rows whose columns are in a ring of ranks, or whose state goes from rank to rank, beside the same
rows on one rank."""

import pytest

from tests import launching
from tests.distributed import ranks
from tests.distributed.test_sequence import CLIP, GROUPED, plainly

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

RING, STEPS = "engine.context_parallel=2", 4
STATES = [
    ["model.mixer=mingru", "documents"],
    ["model.mixer_pattern=[gated_deltanet,attention]"],
    ["model.mixer=gated_deltanet", "model.mixer.conv=9", "documents"],
    ["model.mixer=lstm", "documents"],
    ["model.mixer=lstm", "model.activation_checkpointing=full"],
    ["model.mixer.token_shift=true", "documents"],
    ["model.mtp_layers=2", "documents"],
    ["model.bigram_rows=50", "model.value_embedding=1"],
]
RINGS = [
    [],
    ["padding", "model.mixer=latent"],
    ["model.num_kv_heads=2", "model.position=alibi", "documents"],
    ["model.mixer=window", "model.mixer.window=5", "documents", "model.position=learned"],
    ["model.mixer=window", "model.mixer.window=3", "model.mixer.global_tokens=2", "documents"],
    ["model.mixer_pattern=[attention,{kind: window, window: 4}]", "model.position=sinusoidal"],
    ["model.causal=false", "objective=masked"],
    ["model.num_kv_heads=2", "model.activation_checkpointing=selective", "model.bias=true"],
    ["model.mlp=moe", "model.mlp.expert_width=20", "model.mlp.balance_loss=0.5"],
]


@pytest.mark.parametrize(
    ("size", "exchange", "cases"),
    [(2, 2, STATES), (3, 1, STATES + RINGS), (4, 2, STATES[:2] + STATES[5:7] + RINGS)],
)
def test_losses_and_gradients_are_those_of_whole_rows(size, exchange, cases):
    results = ranks.run("columns_scenarios:gradients", size, 580, cases=cases, sequence=exchange)
    for case, (error, worst) in zip(cases, results, strict=True):
        assert error < 1e-5, (case, worst)


def test_a_ring_attends_as_one_rank_does():
    for seed, error in enumerate(ranks.run("columns_scenarios:attends", 3, seeds=[*range(40)])):
        assert error < 2e-5, seed


TENSOR = ["engine.tensor_parallel=2", "model.mlp_width=42", CLIP]
PATTERN = "model.mixer_pattern=[lstm,mingru,attention]"
BOTH = [[1, *GROUPED, RING], [3, CLIP, "model.mixer=window", "model.mixer.window=5", RING]]
ALONE = [
    [1, CLIP, "model.mixer_pattern=[gated_deltanet,attention]", RING],
    [3, CLIP, PATTERN, "model.num_layers=3", RING],
    [1, *TENSOR, RING],
    [3, *TENSOR, "model.position=alibi", RING],
]


@pytest.mark.parametrize(("exchange", "cases"), [(2, BOTH), (1, ALONE)])
def test_every_stage_trains_a_ring_as_one_rank(exchange, cases):
    arguments = {"cases": cases, "near": exchange, "steps": STEPS, "documents": True}
    compare(cases, ranks.run("sequence_scenarios:trained", 4, 580, **arguments))


def compare(cases, results):
    for case, (rows, scores) in zip(cases, results, strict=True):
        alone = [word for word in case[1:] if "_parallel" not in word]
        expected, held_out = plainly([0, *alone], True)
        for row, plain in zip(rows, expected, strict=False):
            assert row == pytest.approx(plain, rel=1e-5), case
        if len(rows) == STEPS:
            for losses, plain in zip(scores, held_out, strict=True):
                assert losses == pytest.approx(plain, rel=1e-5), case


def test_a_block_in_a_ring_is_one_graph():
    cases = [[3, *GROUPED, "model.activation_checkpointing=selective", RING]]
    cases += [[1, CLIP, "model.mixer_pattern=[mingru,gated_deltanet]", RING]]
    arguments = {"near": 1, "steps": 2, "documents": True, "compiled": True}
    compare(cases, ranks.run("sequence_scenarios:trained", 2, cases=cases, **arguments))


def test_a_run_in_a_ring_repeats_its_steps_bit_for_bit(dataset, tmp_path):
    command = (f"data.path={dataset}", "train.tokens=null", "checkpoint.every=8")
    command += ("launch.processes=2", RING, "engine=zero2", "optimizer=muon")
    command += ("data.document_mask=true", "train.steps=16", "validation.every=16")
    command += ("model.mixer_pattern=[mingru,attention]",)
    whole, again = launching.whole_and_repeated(tmp_path, *command, step=8, cold=True)
    assert len(whole) == 16
    assert again == whole
