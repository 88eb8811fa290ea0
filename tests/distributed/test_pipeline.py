"""Pipeline parallelism: stages of ranks compute what one rank computes."""

import itertools

import pytest
import torch

from forescale.checkpoint.reader import Checkpoint
from tests import launching
from tests.distributed import ranks
from tests.distributed.mesh_scenarios import STATE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

STEPS, TWO, FOUR = 3, "engine.pipeline_parallel=2", "engine.pipeline_parallel=4"
LAYERS, TIED, MUON = "model.num_layers=4", "model.tie_embeddings=true", "optimizer=muon"
INTERLEAVED = "engine.pipeline_schedule=interleaved"
ZERO_BUBBLE = ["engine.pipeline_schedule=zero-bubble", "train.compile=off"]
TENSOR = ["engine.tensor_parallel=2", "model.mlp_width=42", "model.num_kv_heads=2"]
MOE = ["model.mlp=moe", "model.mlp.expert_width=20", "model.mlp.balance_loss=0.5"]
SIGMOID = [*MOE, "model.mlp.scores=sigmoid", "model.mlp.bias_speed=0.01", "model.z_loss=0.001"]
LATER = ["model.mtp_layers=2", "model.bigram_rows=31"]
RESIDUAL = ["model.mixer.value_residual=0.5", "model.num_kv_heads=2"]
# Of a size: what is compared with one rank; the optimizer's clip is of all cases.
CASES = {
    2: [
        [0, TWO, TIED, MUON],
        [1, TWO, *LATER, *SIGMOID, INTERLEAVED],
        [1, TWO, INTERLEAVED, "engine.pipeline_chunks=3", "model.num_layers=6", *RESIDUAL],
        [1, TWO, *ZERO_BUBBLE, *MOE, MUON, "model.activation_checkpointing=full"],
        [0, TWO, *ZERO_BUBBLE, "model.activation_checkpointing=selective"],
        [1, TWO, "objective=masked", "model.causal=false", "model.head=dense", TIED],
    ],
    4: [
        [0, FOUR],
        [1, FOUR, TIED, MUON, *RESIDUAL, "model.activation_checkpointing=full"],
        [1, TWO, TIED, "model.position=learned"],  # and 2 groups that read different windows
        [0, TWO, *TENSOR, MUON, "model.position=relative", "model.mixer.qk_norm=head"],
        [1, TWO, *TENSOR, TIED, *LATER, *ZERO_BUBBLE],
        [1, TWO, "engine.context_parallel=2", "model.num_kv_heads=2", LATER[0]],
        [1, TWO, "engine.sequence_parallel=2", "model.position=relative"],
        [1, TWO, "engine.context_parallel=2", *ZERO_BUBBLE, *LATER],
        [1, TWO, "engine.expert_parallel=2", *SIGMOID, "model.mlp.dense_layers=1"],
    ],
}


def words(case):
    return [case[0], LAYERS, "optimizer.clip=0.5", *case[1:]]


def undivided(case):
    return [word for word in case if not str(word).startswith("engine.")]


@pytest.mark.parametrize("size", CASES)
def test_stages_compute_what_one_rank_computes(size):
    cases = [words(case) for case in CASES[size]]
    healthy = [words([1, TWO, TIED]), words([0, TWO])]
    divided, faults, dropped = ranks.run(
        "pipeline_scenarios:everything", size, cases=cases, healthy=healthy, steps=STEPS
    )
    alone, *_ = ranks.run(
        "pipeline_scenarios:everything", 1, cases=[*map(undivided, cases)], healthy=[], steps=STEPS
    )
    for case, (rows, scores), (expected, held_out) in zip(cases, divided, alone, strict=True):
        for row, plain in zip(rows, expected, strict=True):
            assert row == pytest.approx(plain, rel=1e-5), case
        assert torch.tensor(scores).flatten() == pytest.approx(
            torch.tensor(held_out).flatten(), rel=1e-5
        )
    assert faults == [[None, None]] * 2  # the self-check, of healthy ranks
    assert all(rows == plain for plain, rows in dropped)


CARRIED = [LAYERS, *SIGMOID, TIED, MUON, "model.mtp_layers=1", *TENSOR[1:]]
BF16 = ["half", 1, 1, TWO, "precision=bf16"]
MESHES = {  # by the number of ranks: name, sequence ranks, ZeRO stage, more
    1: [["one", 1, 1]],
    2: [["parts", 1, 1, TWO, INTERLEAVED], BF16],
    4: [["four", 1, 0, FOUR], ["both", 1, 1, TWO, "engine.expert_parallel=2"]],
}


def test_every_mesh_loads_every_other_and_continues_its_own_to_the_bit(tmp_path):
    losses = {}
    for size in (4, 2, 1, 2, 4):  # on the way back, what was not saved yet on the way there
        cases = [[*case, *CARRIED] for case in MESHES[size]]
        arguments = {"cases": cases, "folder": str(tmp_path), "known": losses}
        losses |= ranks.run("mesh_scenarios:carry", size, **arguments)
    names = [name for cases in MESHES.values() for name, *_ in cases]
    first = {name: Checkpoint(tmp_path / "first" / name / STATE) for name in names}
    assert all(checkpoint.shapes == first["one"].shapes for checkpoint in first.values())
    for target, source in itertools.product(names, names):
        again, old = Checkpoint(tmp_path / "again" / f"{target}<{source}" / STATE), first[source]
        after, expected = losses[f"{target}<{source}"], losses[source]
        if target == source:
            assert after == expected
        elif BF16[0] in (target, source):  # which rounds
            continue
        for name in old.shapes:
            for state in old.reader.states(name):
                assert torch.equal(again.tensor(name, state), old.tensor(name, state))
        for row, plain in zip(after, expected, strict=True):
            assert row == pytest.approx(plain, rel=1e-5), (target, source)


def test_a_run_in_stages_resumes_to_the_bit_after_a_kill(dataset, tmp_path):
    """With a batch that grows from fewer micro-batches than stages, rows that grow, held-out
    losses and dropout."""
    command = (f"data.path={dataset}", "launch.processes=2", TWO, INTERLEAVED, LAYERS, TIED)
    command += ("train.tokens=null", "train.steps=24", "checkpoint.every=5", "validation.every=12")
    command += ("model.dropout=0.1", "train.first_batch=2", "train.batch_ramp='16 steps'", MUON)
    command += ("train.first_length=8", "train.length_ramp=4", "data.document_mask=true")
    whole, cut = launching.whole_and_resumed(tmp_path, *command, step=14)
    assert len(whole) == 24
    assert cut == whole
