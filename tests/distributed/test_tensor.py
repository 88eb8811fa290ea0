"""Tensor parallelism: ranks that divide matrices compute what one rank computes."""

import pytest
import torch

from forescale.models.memory import activations
from forescale.plan.bytes.parameters import inventory
from forescale.plan.communication import collectives
from tests.distributed import jobs, ranks
from tests.distributed import sequence_scenarios as scenario
from tests.distributed.test_sequence import STEPS, plainly

pytestmark = pytest.mark.distributed

MODELS = [
    {"mixer__qk_norm": "head", "bias": True, "mlp": "gelu", "position": "relative"},
    {
        "mixer": "window",
        "mixer__window": 8,
        "mixer__gate": "head",
        "z_loss": 1e-3,
        "loss_chunk": 16,
    },
    {"mixer": "latent", "head": "dense"},
    {"activation_checkpointing": "full", "mixer__value_residual": 0.5, "tie_embeddings": True},
    {"activation_checkpointing": "selective", "bias": True, "mlp": "gelu"},
    {"mtp_layers": 2, "mtp_weight": 0.3, "position": "alibi"},
    {
        "value_embedding": 1,
        "bigram_rows": 31,
        "mixer__token_shift": True,
        "activation_checkpointing": "full",
    },
    {"vocab_size": 97, "head__softcap": 5.0, "norm__placement": "sandwich"},
    {"encoder_layers": 1, "source_length": 12, "position": "relative", "norm__placement": "post"},
]


DROPPED = [
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "selective"},
    {"mixer": "latent"},
]


def test_ranks_compute_what_the_whole_model_does_and_drop_what_they_should():
    # One of the two sums its products in 3 parts.
    chunks = [(1, 3), (3, 1)]
    cases = [
        [words, compiled, chunks[i % 2][compiled]]
        for i, words in enumerate(MODELS)
        for compiled in (False, True)
    ]
    results = ranks.run("tensor_scenarios:everything", 2, cases=cases, drops=DROPPED)
    parts, dropped = results["parts"], results["dropped"]
    assert len(parts) == len(cases)
    assert max(parts) < 1e-5, list(zip(cases, parts, strict=True))
    for words, (differ, without, with_dropout, again) in zip(DROPPED, dropped, strict=True):
        assert differ == [], words  # the residual stream, and the gradients of what reads it
        assert without == 1, words  # the same weights: the heads differ by dropout alone
        assert with_dropout < 0.1, words
        assert again, words


CLIP = "optimizer.clip=0.5"
KEYS = ["model.num_kv_heads=2", "model.mlp_width=42", CLIP]
STAGES = [
    [stage, *KEYS, "model.mixer.qk_norm=head", "model.position=relative"] for stage in range(4)
]


@pytest.mark.parametrize(
    ("size", "tensor", "near", "with_muon"), [(2, 2, 1, [0]), (4, 2, 1, [1, 3]), (4, 2, 2, [2])]
)
def test_every_stage_trains_divided_matrices_as_one_rank(size, tensor, near, with_muon):
    parts = T5 if near == 1 else []
    muon = [[*STAGES[stage], *parts, "optimizer=muon"] for stage in with_muon]
    cases = [[*case, f"engine.tensor_parallel={tensor}"] for case in STAGES + muon]
    results = ranks.run("sequence_scenarios:trained", size, cases=cases, near=near, steps=STEPS)
    whole = [plainly(STAGES[0], False)] * len(STAGES) + [plainly(muon[0], False)] * len(muon)
    for case, (rows, scores), (expected, held_out) in zip(cases, results, whole, strict=True):
        for row, plain in zip(rows, expected, strict=True):
            assert row == pytest.approx(plain, rel=1e-5), case
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(held_out), msg=f"{case}")


def test_the_self_check_finds_no_fault_in_healthy_ranks():
    cases = [[*STAGES[stage], "engine.tensor_parallel=2"] for stage in (0, 2, 3)]
    cases[1] += ["optimizer=muon"]
    results = ranks.run("sequence_scenarios:checked", 4, cases=cases, near=2)
    assert results == [[None, None]] * 3


WIDE = ["model.width=128", "model.vocab_size=72", "train.micro_batch=2"]
T5 = ["model.encoder_layers=1", "model.source_length=6", "objective=seq2seq"]
ALIBI = "model.position=alibi"
EXPERTS = ["model.mlp=moe", "engine.expert_parallel=2", "model.mlp.expert_width=40"]
EXPERTS += ["model.mlp.shared=1", "model.mlp.scores=sigmoid"]
COSTS = [
    [
        0,
        "model.num_kv_heads=2",
        "model.mixer.qk_norm=head",
        "model.head_dim=20",
        "model.bias=true",
        "model.mlp=gelu",
    ],
    [1, "model.mixer=window", "model.mixer.window=5", "model.mixer.gate=channel", "documents"],
    [0, "model.mixer=latent", "model.vocab_size=71"],
    [1, "model.activation_checkpointing=full", "model.tie_embeddings=true"],
    [0, "model.mixer.value_residual=0.5", "model.loss_chunk=8", "model.mlp.chunk=4", ALIBI],
    [1, "model.activation_checkpointing=selective", "model.num_kv_heads=2"],
    [1, *T5, "model.position=relative", "model.mixer.qk_norm=head"],
    [1, *T5, "model.activation_checkpointing=full"],
    [0, *EXPERTS],
    [0, *EXPERTS, "model.activation_checkpointing=full", "model.mlp.dense_layers=1"],
]


def test_the_plan_knows_what_divided_matrices_keep_and_send():
    divided = ["engine.tensor_parallel=2", "model.mlp_width=84", "train.compile=off"]
    cases = [[*case[:1], *divided, *WIDE, *case[1:]] for case in COSTS]
    results = ranks.run("sequence_scenarios:costs", 2, cases=cases, near=1)
    for case, (bytes_kept, sent, calls) in zip(cases, results, strict=True):
        job, size = scenario.job_of(case, 2, 1), jobs.LENGTH
        masked = "documents" in case
        planned = activations(job.model, 2, size, 4, masked, fused_norms=False, tensor=2)
        assert bytes_kept == pytest.approx(planned.saved, rel=0.03), case
        (planned,) = (c for c in collectives(job, inventory(job), 2) if "stream" in c.label)
        assert (planned.payload, planned.calls) == (sent, calls), case
