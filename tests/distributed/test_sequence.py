"""A sequence divided among real ranks against the same training on one, without DeepSpeed."""

import signal

import pytest
import torch

from forescale.engine.optim import build_optimizer, parameter_groups
from forescale.engine.optimizers.muon import use_precision
from forescale.engine.step import checked_losses
from forescale.models import Transformer
from forescale.models.memory import activations
from forescale.plan.bytes.parameters import inventory
from forescale.plan.communication import collectives
from tests import launching
from tests.distributed import jobs, ranks
from tests.distributed import sequence_scenarios as scenario
from tests.matrix import FULL

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

STEPS, BIASED = 4, "model.mlp.bias_speed=0.01"
CLIP = "optimizer.clip=0.5"
GROUPED = ["model.num_kv_heads=1", CLIP]  # fewer than ranks
STAGES = [[stage, *GROUPED] for stage in range(4)]
MIXERS = [
    [0, "model.num_kv_heads=2", "model.mixer.gate=channel", "model.mixer.value_residual=0.5"],
    [0, "model.mixer=window", "model.mixer.window=5", "model.num_kv_heads=2"],
    [0, "model.mixer=window", "model.mixer.window=5", "model.mixer.global_tokens=2"],
    [0, "model.mixer=latent", "model.mixer.query_rank=14"],
    [0, "model.position=alibi", "model.mixer.qk_norm=layer", "model.z_loss=0.001"],
    [0, "model.position=relative", "model.num_kv_heads=1"],
    [0, "model.position=learned", "model.tie_embeddings=true", "model.bias=true"],
    [0, "model.activation_checkpointing=full", "model.mlp.chunk=3"],  # as for long windows
    [0, "model.activation_checkpointing=selective", "model.num_kv_heads=1"],
    [0, "model.causal=false", "objective=masked", "model.head=dense"],
    [
        0,
        "model.mlp=moe",
        "model.mlp.expert_width=20",
        "model.mlp.balance_loss=0.5",
        "model.mlp.z_loss=0.1",
    ],
    [0, "model.mlp=moe", "model.mlp_width=40", "model.mlp.scores=sigmoid", BIASED],
]


def plainly(case, documents):
    """The same training in one process, without ranks: a plain loop over whole rows."""
    job = scenario.job_of(case, 1, 1)
    torch.manual_seed(0)
    model = Transformer(job.model)
    use_precision("fp32")
    groups = parameter_groups(model.named_parameters(), job.optimizer, model.muon_parameters())
    optimizer = build_optimizer(job.optimizer, [group.as_dict() for group in groups])
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"]
    rows = []
    for step in range(STEPS):
        data, nats = jobs.batch(step, 0, 1, documents), 0.0
        for micro in data.micro:
            output = model(micro.tokens, micro.targets, documents_BL=micro.documents)
            losses, penalty = checked_losses(output, len(micro.tokens))
            ((losses.sum() + penalty) / data.targets).backward()
            nats += losses.sum().item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([nats / data.targets, norm.item()])
    with torch.no_grad():
        held_out = [
            model.eval()(micro.tokens, micro.targets, documents_BL=micro.documents).tolist()
            for micro in jobs.batch(99, 0, 1, documents).micro
        ]
    return rows, held_out


def plain_gradients(case):
    job = scenario.job_of(case, 1, 1)
    torch.manual_seed(0)
    model, data = Transformer(job.model), jobs.batch(0, 0, 1, True)
    for micro in data.micro:
        output = model(micro.tokens, micro.targets, documents_BL=micro.documents)
        losses, penalty = output if isinstance(output, tuple) else (output, 0.0)
        ((losses.sum() + penalty) / data.targets).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("size", "near", "documents"), [(2, 2, False), (4, 2, True), (4, 4, False)]
)
def test_every_stage_trains_a_divided_sequence_as_one_rank(size, near, documents):
    arguments = {"cases": STAGES, "near": near, "steps": STEPS, "documents": documents}
    results = ranks.run("sequence_scenarios:trained", size, 580, **arguments)
    expected, held_out = plainly(STAGES[0], documents)
    assert any(norm > 0.5 for _, norm in expected), "clipping must take part"
    for case, (rows, scores) in zip(STAGES, results, strict=True):
        for row, plain in zip(rows, expected, strict=True):
            assert row == pytest.approx(plain, rel=1e-5), case
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(held_out), msg=f"{case}")


def test_gradients_of_each_mixer_are_those_of_one_rank():
    results = ranks.run("sequence_scenarios:gradients", 2, 580, cases=MIXERS, near=2)
    for case, gradients in zip(MIXERS, results, strict=True):
        for name, plain in plain_gradients(case).items():
            torch.testing.assert_close(
                torch.tensor(gradients[name]), plain, rtol=1e-4, atol=1e-6, msg=f"{case}: {name}"
            )


WIDE = "model.width=128"  # so that what is counted outweighs a few numbers of each token
COSTS = [[*case, WIDE] for case in MIXERS if "model.causal=false" not in case]
COSTS += [[1, "model.num_kv_heads=2", WIDE, "documents"]]


@pytest.mark.parametrize("near", [2, *[4] * FULL])
def test_the_plan_knows_what_a_divided_sequence_keeps_and_sends(near):
    results = ranks.run("sequence_scenarios:costs", near, 580, cases=COSTS, near=near)
    for case, (bytes_kept, sent, calls) in zip(COSTS, results, strict=True):
        job = scenario.job_of(case, near, near)
        planned = [c for c in collectives(job, inventory(job), near) if c.kind == "all_to_all"]
        assert [(c.payload, c.ranks, c.calls) for c in planned] == [(sent, near, calls)], case
        masked, size = "documents" in case, jobs.LENGTH
        planned = activations(job.model, 2, size, 4, masked, fused_norms=False, ranks=near)
        assert bytes_kept == pytest.approx(planned.saved, rel=0.07), case


def test_a_block_with_its_exchange_is_one_graph():
    cases = [[1, *GROUPED], [1, CLIP, "model.mixer=window", "model.mixer.window=5"]]
    cases += [[2, CLIP, "model.activation_checkpointing=full", "model.mlp.chunk=3"]]
    cases += [[3, CLIP, "model.activation_checkpointing=selective"]]
    arguments = {"near": 2, "steps": 2, "documents": True, "compiled": True}
    results = ranks.run("sequence_scenarios:trained", 2, cases=cases, **arguments)
    for case, (rows, _) in zip(cases, results, strict=True):
        expected, _ = plainly(case, True)
        for row, plain in zip(rows, expected[:2], strict=True):
            assert row == pytest.approx(plain, rel=1e-5), case


LENGTH = ("train.tokens=null", "train.steps=24", "checkpoint.every=8", "validation.every=24")
DIVIDED = ("launch.processes=2", "engine.sequence_parallel=2")


def test_a_divided_run_repeats_its_steps_bit_for_bit(dataset, tmp_path):
    command = (f"data.path={dataset}", *LENGTH, *DIVIDED, "engine=zero2", "optimizer=muon")
    command += ("model.dropout=0.1", "data.document_mask=true")
    command += ("train.steps=16", "validation.every=16")
    whole, again = launching.whole_and_repeated(tmp_path, *command, step=8)
    assert len(whole) == 16
    assert again == whole


def test_a_run_goes_on_with_other_ranks_divisions_and_stages(dataset, tmp_path):
    """The same data, and nearly the same losses, as a run that stays."""
    base = (f"data.path={dataset}", *LENGTH, "optimizer=adamw", "precision=fp32")
    launching.train(tmp_path, "run.name=still", *base, "launch.processes=1")
    run, base = tmp_path / "moving", ("run.name=moving", *base)
    places = (("launch.processes=1", "engine=zero0"), (*DIVIDED, "engine=zero3"))
    for place, step in zip(places, (6, 14), strict=True):
        launching.interrupt(launching.start(tmp_path, *base, *place), run, step, signal.SIGINT)
    last = ("launch.processes=4", "engine.sequence_parallel=2", "engine=zero2")
    last += ("engine.context_parallel=2",)
    launching.train(tmp_path, *base, *last)
    moving, still = (launching.rows(tmp_path / name) for name in ("moving", "still"))
    for key in ("step", "g0", "g1", "tokens", "tokens_hash"):
        assert [row[key] for row in moving] == [row[key] for row in still]
    assert moving[-1]["loss"] == pytest.approx(still[-1]["loss"], rel=1e-4)
    moving, still = (launching.rows(tmp_path / name, "validation") for name in ("moving", "still"))
    assert [row["targets"] for row in moving] == [row["targets"] for row in still]
    assert moving[-1]["loss"] == pytest.approx(still[-1]["loss"], rel=1e-4)
    assert "numerics_changed" in launching.events(run)
