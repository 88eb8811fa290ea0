"""The plan's bytes against real ranks: every live tensor by kind, every collective, exactly.

At 2 ranks all cases; at 1 and 4, where only the cut of the states is new, every second one of the
plain model. FORESCALE_MATRIX=full takes all.
"""

import pytest

from forescale.plan.bytes.memory import states
from forescale.plan.bytes.parameters import inventory
from forescale.plan.communication import collectives
from tests.distributed import ranks
from tests.distributed.cost_scenarios import FLAGS, MICRO_BATCHES, job_of
from tests.distributed.jobs import SMALL, zero
from tests.matrix import FULL

pytestmark = pytest.mark.distributed

KINDS = [[o, p] for o in ("adamw", "muon") for p in ("bf16", "fp32")]

CASES = [[stage, *kind] for stage in range(3) for kind in KINDS]
CASES += [[3, *kind, zero(SMALL)] for kind in KINDS]
CASES += [[1, "adamw", "bf16", "model.bias=true", "model.norm=layernorm", "model.mlp=gelu"]]
CASES += [[1, "muon", "bf16", "model.mtp_layers=1"]]
CASES += [[3, "adamw", "bf16"]]  # every parameter is small, and stays


# The other parts of a model, several in one.
EXPERTS = ["model.mixer=latent", "model.mixer.query_rank=14", "model.mlp=moe"]
EXPERTS += ["model.mlp.experts=5", "model.mlp.expert_width=13", "model.mlp.shared=1"]
EXPERTS += ["model.mlp.scores=sigmoid", "model.mlp.bias_speed=0.01"]
BERT = ["model.causal=false", "objective=masked", "model.head=dense", "model.mixer.qk_norm=none"]
BERT += ["model.norm.embedding=true", "model.norm.placement=residual", "model.norm=layernorm"]
BERT += ["model.bias=true", "model.mlp=gelu_exact", "model.position=learned"]
BERT += ["model.tie_embeddings=true"]
T5 = ["model.encoder_layers=2", "objective=seq2seq", "model.source_length=9"]
T5 += ["model.position=relative"]
RECURRENT = ["model.num_layers=3", "model.mixer_pattern=[gated_deltanet,lstm,mingru]"]
SHARED = "gate: channel, value_residual: 0.5"
GATED = [
    f"model.mixer_pattern=[{{kind: window, window: 5, {SHARED}}},{{kind: attention, {SHARED}}}]",
    "model.norm.placement=sandwich",
]
TOKENS = ["model.value_embedding=1", "model.bigram_rows=31", "model.mixer.token_shift=true"]
IN_FP32 = "engine.gradient_dtype=fp32"
DIVIDED = [*EXPERTS, "model.mlp.experts=6", "engine.expert_parallel=2"]
CAPACITY = "model.mlp.capacity=1.25"
PARTS = [
    *[[stage, "muon", "bf16", IN_FP32] for stage in range(3)],
    [3, "muon", "bf16", IN_FP32, zero(SMALL)],
    *[[stage, "muon", "bf16", IN_FP32, zero("overlap_comm: true")] for stage in (1, 2)],
    [0, "muon", "bf16", *RECURRENT],
    [1, "muon", "bf16", *EXPERTS],
    [2, "muon", "fp32", *T5],
    [2, "adamw", "bf16", *GATED],
    [1, "muon", "bf16", *TOKENS],
    [3, "muon", "fp32", zero(SMALL), *TOKENS],
    [3, "muon", "bf16", zero(SMALL), *EXPERTS],
    [3, "adamw", "fp32", zero(SMALL), *BERT],
    [3, "muon", "fp32", zero(SMALL), *RECURRENT],
]
LORA = ["lora.rank=3", "run.from.run=base", "run.from.load=weights"]
PARTS += [
    [0, "adamw", "bf16", *LORA],
    [1, "adamw", "bf16", *LORA],
    [2, "adamw", "fp32", *LORA],
    [3, "adamw", "bf16", zero(SMALL), *LORA],
]
DIVIDED_STATES = [
    [0, "muon", "bf16", *DIVIDED],
    [1, "muon", "bf16", *DIVIDED],
    [2, "adamw", "bf16", *DIVIDED, "model.mtp_layers=1"],
]
MATRICES = ["engine.tensor_parallel=2", "model.num_heads=2", "model.mlp_width=22"]
MATRICES += ["model.vocab_size=72", "model.bias=true", "model.position=relative", *TOKENS]
DIVIDED_STATES += [[0, "muon", "bf16", *MATRICES], [1, "muon", "bf16", *MATRICES]]
DIVIDED_STATES += [[2, "adamw", "bf16", *MATRICES], [3, "muon", "fp32", zero(SMALL), *MATRICES]]
BOTH = [*DIVIDED, "model.mlp.expert_width=14", "engine.tensor_parallel=2", "model.num_heads=2"]
BOTH += ["model.vocab_size=72"]
DIVIDED_STATES += [[1, "muon", "bf16", *BOTH], [3, "muon", "bf16", zero(SMALL), *DIVIDED]]

GROUPS = "engine.shard_group=2"
COPIES = [[stage, kind, "bf16", GROUPS] for stage, kind in ((1, "muon"), (2, "adamw"))]
COPIES += [[3, "muon", "bf16", GROUPS, zero(SMALL)]]


def chosen(cases, size, parts):
    if size == 2 or FULL:
        return cases + parts
    return [case for i, case in enumerate(cases) if (i + i // 4) % 2 == 0]


def test_the_chosen_cases_have_every_stage_optimizer_and_precision():
    cases = chosen(CASES, 4, [])
    assert {case[0] for case in cases} == {0, 1, 2, 3}
    assert {tuple(case[1:3]) for case in cases} == {tuple(kind) for kind in KINDS}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_states_are_the_tensors_of_real_ranks(size):
    cases = chosen(CASES, size, PARTS) + (DIVIDED_STATES if size > 1 else [])
    cases += COPIES if size == 4 else []
    results = ranks.run("cost_scenarios:states", size, 580, cases=cases)
    for case, measured in zip(cases, results, strict=True):
        job = job_of(case, size)
        held = inventory(job)
        for rank, results in enumerate(measured):
            s = states(job, held, size, rank)
            where = f"{case} on rank {rank} of {size}"
            for moment in ("held", "after"):
                now = results[moment]
                assert now.get("weights", 0) == s.weights, where
                assert now.get("resident", 0) == s.resident, where
                assert now.get("masters", 0) == s.masters, where
                assert now.get("moments", 0) == s.moments, where
                assert now.get("buckets", 0) <= s.buckets, where
                assert now.get("other", 0) <= FLAGS, where
            assert results["held"].get("gradients", 0) == s.held, where
            assert results["accumulating"] == s.gradients, where
            assert case[0] not in (1, 2) or results["buckets"] == s.buckets, where
            as_they_are = case[0] == 0 and (case[2] == "fp32" or IN_FP32 in case)
            assert results["updating"] == (s.held if as_they_are else s.update), where
        most = states(job, held, size)
        every = [states(job, held, size, rank) for rank in range(size)]
        assert most.backward == max(s.backward for s in every), case


FAR = "stage3_max_reuse_distance: 0, stage3_prefetch_bucket_size: 0"
SOME = "stage3_max_reuse_distance: 4000, stage3_prefetch_bucket_size: 0"
CHECKPOINTING = "model.activation_checkpointing=full"
SELECTIVE = "model.activation_checkpointing=selective"
TRAFFIC = [
    *[[stage, kind, "bf16"] for stage in range(4) for kind in ("adamw", "muon")],
    *[[3, kind, "bf16", zero(SMALL)] for kind in ("adamw", "muon")],
    *[[3, "adamw", "bf16", zero(SMALL, reuse), *words]
      for reuse in (FAR, SOME) for words in ([], [CHECKPOINTING], [SELECTIVE])],
    [3, "adamw", "bf16", zero(SMALL, SOME), "model.tie_embeddings=true"],
    [3, "adamw", "bf16", zero(SMALL, SOME), *TOKENS],
    [3, "adamw", "bf16", zero(SMALL), *TOKENS, CHECKPOINTING],
    *[[3, "adamw", "bf16", zero(SMALL, SOME), "model.mtp_layers=2", *words]
      for words in ([], [CHECKPOINTING, "model.tie_embeddings=true"])],
    [2, "adamw", "fp32", "model.tie_embeddings=true"],
]  # fmt: skip
PARTS_TRAFFIC = [
    *[[stage, "adamw", "bf16", IN_FP32] for stage in range(3)],
    [3, "muon", "bf16", IN_FP32, zero(SMALL)],
    [3, "adamw", "bf16", IN_FP32, zero(SMALL)],
    [2, "adamw", "bf16", IN_FP32, "engine.deepspeed={communication_data_type: bf16}"],
    [1, "muon", "bf16", *EXPERTS],
    [2, "adamw", "bf16", *T5],
    [3, "adamw", "bf16", zero(SMALL, SOME), CHECKPOINTING, *EXPERTS],
    [3, "adamw", "bf16", zero(SMALL, FAR), *BERT],
    [3, "muon", "bf16", zero(SMALL), *T5],
    [3, "muon", "bf16", zero(SMALL), *RECURRENT],  # the LSTM's matrix is larger than a bucket
    [3, "adamw", "bf16", zero(SMALL, SOME), CHECKPOINTING, "model.dropout=0.1", *GATED],
    [3, "adamw", "bf16", zero(SMALL, SOME), CHECKPOINTING, "model.dropout=0.1"],
]


PARTS_TRAFFIC += [[2, "adamw", "fp32", *LORA], [3, "adamw", "bf16", zero(SMALL), *LORA]]
DIVIDED_TRAFFIC = [
    [0, "adamw", "bf16", *DIVIDED],
    [1, "muon", "bf16", *DIVIDED, CHECKPOINTING, "engine.sequence_parallel=2", "model.num_heads=2"],
    [2, "adamw", "bf16", *DIVIDED, CAPACITY, "model.mtp_layers=1"],
    [0, "muon", "bf16", *MATRICES],
    [1, "muon", "bf16", *MATRICES],
    [3, "muon", "bf16", zero(SMALL), *MATRICES],
    [2, "adamw", "bf16", *BOTH, CHECKPOINTING],
    [3, "adamw", "bf16", zero(SMALL, SOME), *BOTH, CHECKPOINTING],
    [3, "muon", "bf16", zero(SMALL), *DIVIDED],
]


PIPELINE = "engine.pipeline_parallel=2"
INTERLEAVED = [PIPELINE, "engine.pipeline_schedule=interleaved", "model.num_layers=4"]
DIVIDED_TRAFFIC += [
    [0, "adamw", "bf16", PIPELINE, "model.tie_embeddings=true"],
    [1, "muon", "bf16", *INTERLEAVED, CHECKPOINTING],
    [1, "adamw", "fp32", PIPELINE, "model.mtp_layers=1", IN_FP32],
]


@pytest.mark.parametrize("size", [2, 4])
def test_traffic_is_what_real_ranks_send(size):
    cases = chosen(TRAFFIC, size, PARTS_TRAFFIC) + DIVIDED_TRAFFIC
    if size == 4:
        near = "engine.hierarchical_partition=2"
        cases = cases + [[3, "adamw", "bf16", zero(SMALL, reuse), near] for reuse in (FAR, SOME)]
        cases += [*COPIES, [1, "adamw", "bf16", *DIVIDED, GROUPS]]
    measured = ranks.run("cost_scenarios:traffic", size, 580, cases=cases)
    for case, counts in zip(cases, measured, strict=True):
        job = job_of(case, size)
        expected: dict[str, int] = {}  # of the stage that has the most
        for stage in range(job.engine.pipeline_parallel):
            sent: dict[str, int] = {}
            for c in collectives(job, inventory(job), size, stage):
                if (
                    "residual" in c.label or "columns" in c.label
                ):  # test_tensor.py, test_sequence.py
                    continue
                kind = "muon" if "matrices" in c.label and c.kind == "all_to_all" else c.kind
                name = f"{kind}/{c.ranks}"
                sent[name] = sent.get(name, 0) + c.payload
            expected = {n: max(expected.get(n, 0), sent.get(n, 0)) for n in expected | sent}
        assert counts == expected, f"{case} on {size} ranks, {MICRO_BATCHES} micro-batches"
