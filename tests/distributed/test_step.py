"""The engine's step against a plain PyTorch loop, on real ranks of real DeepSpeed."""

import pytest
import torch

from tests.distributed import ranks, small

pytestmark = pytest.mark.distributed

STEPS = 20
CASES = [[stage, kind, "fp32", 2.0, False] for stage in range(4) for kind in ("adamw", "muon")]
OFFLOAD = [[stage, kind, "fp32", 2.0, True] for stage in (1, 2, 3) for kind in ("adamw", "muon")]


def plain_losses(kind: str, clip: float) -> list[list[float]]:
    """The same training without DeepSpeed, ranks or micro-batches: whole batches, one process."""
    torch.manual_seed(0)
    model = small.Model()
    groups = small.groups(model, kind)
    adam = torch.optim.AdamW(
        [{**g, "lr": g["peak_learning_rate"]} for g in groups if not g["use_muon"]],
        betas=(0.9, 0.95),
    )
    muon = [p for g in groups if g["use_muon"] for p in g["params"]]
    momenta = [torch.zeros_like(p) for p in muon]
    rows = []
    for step in range(STEPS):
        batch = small.batch(step, 0, 1)
        tokens = torch.cat([m.tokens for m in batch.micro])
        targets = torch.cat([m.targets for m in batch.micro])
        loss = model(tokens, targets).sum() / batch.targets
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        adam.step()
        with torch.no_grad():
            for p, momentum in zip(muon, momenta, strict=True):
                p.mul_(1 - 0.02 * 0.1).sub_(0.02 * orthogonal_update(p.grad, momentum))
        model.zero_grad()
        rows.append([loss.item(), norm.item()])
    return rows


def orthogonal_update(grad: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
    """Muon's published update (Jordan et al. 2024): Nesterov momentum, five quintic Newton-Schulz
    iterations, scaled by sqrt(max(1, rows / columns))."""
    momentum.lerp_(grad, 0.05)
    x = grad.lerp(momentum, 0.95)
    rows, columns = x.shape
    x = x.mT if rows > columns else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.mT if rows > columns else x
    return x * max(1, rows / columns) ** 0.5


@pytest.mark.parametrize("size", [1, 2])
def test_every_stage_trains_like_plain_pytorch(size):
    cases = CASES + (OFFLOAD if size == 2 else [])
    results = ranks.run("step_scenarios:losses", size, cases=cases, steps=STEPS)
    for case, rows in zip(cases, results, strict=True):
        expected = torch.tensor(plain_losses(case[1], clip=2.0))
        assert (expected[:, 1] > 2.0).any(), "clipping must take part"
        got = torch.tensor(rows)
        torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=1e-5, atol=1e-5, msg=f"{case}")
        # The norm is the gradient's, before clipping and before Muon's orthogonalisation.
        torch.testing.assert_close(got[:, 1], expected[:, 1], rtol=1e-3, atol=1e-5, msg=f"{case}")


def test_a_dropped_gradient_leaves_no_trace():
    cases = [
        [stage, kind, precision, clip, False]
        for stage in range(4)
        for kind in ("adamw", "muon")
        for precision, clip in (("fp32", 1.0), ("bf16", None))
    ]
    cases += [[stage, kind, "bf16", 1.0, True] for stage in (1, 2, 3) for kind in ("adamw", "muon")]
    for case, (plain, told) in zip(
        cases, ranks.run("step_scenarios:dropped", 2, cases=cases), strict=True
    ):
        assert told == plain, case


def test_a_gradient_that_is_not_finite_is_not_applied():
    cases = [[s, k, p] for s in range(4) for k in ("adamw", "muon") for p in ("fp32", "bf16")]
    for case, (told, plain, applied) in zip(
        cases, ranks.run("step_scenarios:not_finite", 2, cases=cases), strict=True
    ):
        assert not applied, case
        assert told == plain, case
