"""Experts on real ranks against a plain PyTorch loop: losses, balance, Muon's update by expert."""

import pytest
import torch

from forescale.engine.optim import parameter_groups
from forescale.models import Transformer
from tests.distributed import expert_scenarios as scenario
from tests.distributed import jobs, ranks
from tests.distributed.test_step import orthogonal_update

pytestmark = pytest.mark.distributed

STEPS = 8
PARTS = ["model.num_heads=3", "model.mlp.experts=24", "model.mlp.expert_width=13"]
CASES = [[stage, kind, 1, *PARTS] for stage in range(4) for kind in ("adamw", "muon")]


def plainly(kind):
    """The same training without DeepSpeed or ranks, each expert's matrix orthogonalised alone."""
    job = scenario.job_of([0, kind, 1, *PARTS], 1)
    torch.manual_seed(0)
    model = Transformer(job.model)
    muon = model.muon_parameters()
    groups = parameter_groups(model.named_parameters(), job.optimizer, muon)
    o = job.optimizer
    adam = torch.optim.AdamW(
        [
            {"params": g.params, "lr": g.peak_learning_rate, "weight_decay": g.weight_decay}
            for g in groups
            if g.name != "muon"
        ],
        betas=(o.beta1, o.beta2),
        eps=o.eps,
    )
    muon = [p for g in groups if g.name == "muon" for p in g.params]
    momenta = [torch.zeros_like(p) for p in muon]
    rows = []
    for step in range(STEPS):
        data = jobs.batch(step, 0, 1)
        model.counters().zero_()
        nats = 0.0
        for micro in data.micro:
            losses, penalty = model(micro.tokens, micro.targets)
            ((losses.sum() + penalty) / data.targets).backward()
            nats += losses.sum().item()
        trained = list(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(trained, o.clip or float("inf"))
        adam.step()
        with torch.no_grad():
            for p, momentum in zip(muon, momenta, strict=True):
                p.mul_(1 - o.learning_rate * o.weight_decay)
                matrices = (
                    zip(p, p.grad, momentum, strict=True)
                    if p.ndim == 3
                    else [(p, p.grad, momentum)]
                )
                for matrix, grad, buffer in matrices:
                    matrix.sub_(o.learning_rate * orthogonal_update(grad, buffer))
        model.counted(model.counters().clone())
        model.updated()
        rows.append([nats / data.targets, norm.item(), model.tallies.total("experts").tolist()])
        model.zero_grad()
    return rows, [block.mlp.bias_steps.tolist() for block in model.blocks]


@pytest.mark.parametrize("size", [1, 2])
def test_every_stage_trains_experts_like_plain_pytorch(size):
    expected = {kind: plainly(kind) for kind in ("adamw", "muon")}
    results = ranks.run("expert_scenarios:trained", size, cases=CASES, steps=STEPS)
    for case, result in zip(CASES, results, strict=True):
        rows, bias = expected[case[1]]
        for (loss, norm, extra, load), (nats, plain_norm, totals) in zip(
            result["rows"], rows, strict=True
        ):
            assert loss == pytest.approx(nats, abs=1e-4), case
            assert norm == pytest.approx(plain_norm, rel=1e-3), case
            assert [layer[:-1] for layer in load] == [layer[:-1] for layer in totals], case
            assert 1 < extra["expert_load"] <= extra["expert_load_worst"]
            assert extra["dropped"] == 0
        assert result["biases"] == [bias] * size, case
        assert any(any(layer) for layer in bias)
