"""The engine's step against a plain PyTorch loop, on real ranks of real DeepSpeed."""

import pytest
import torch

from tests.distributed import ranks, small

pytestmark = pytest.mark.distributed

STEPS = 20
KINDS = ("adamw", "lion", "muon", "adamw cautious", "muon cautious")
CASES = [[stage, kind, "fp32", 2.0, False] for stage in range(4) for kind in KINDS]
OFFLOAD = [[stage, kind, "fp32", 2.0, True] for stage in (1, 2, 3) for kind in ("adamw", "muon")]


def plain_losses(kind: str, clip: float) -> tuple[list[list[float]], dict[str, float]]:
    """The same training without DeepSpeed, ranks or micro-batches: whole batches, one process; and
    the gradient norm of each layer at the first step."""
    kind, _, is_cautious = kind.partition(" ")
    torch.manual_seed(0)
    model = small.Model()
    groups = small.groups(model, kind)
    elementwise = Lion if kind == "lion" else torch.optim.AdamW
    adamw_groups = [g | {"lr": g["peak_learning_rate"]} for g in groups if not g["use_muon"]]
    rest = elementwise([g | {"of_all": g["weight_decay"]} for g in adamw_groups], betas=(0.9, 0.95))
    muon = [p for g in groups if g["use_muon"] for p in g["params"]]
    momenta = [torch.zeros_like(p) for p in muon]
    rows = []
    for step in range(STEPS):
        left = 1 - step / STEPS
        for group in rest.param_groups:
            group["weight_decay"] = group["of_all"] * left
        batch = small.batch(step, 0, 1, small.grown(step))
        tokens = torch.cat([m.tokens for m in batch.micro])
        targets = torch.cat([m.targets for m in batch.micro])
        loss = model(tokens, targets).sum() / batch.targets
        loss.backward()
        if step == 0:
            layers = layers_of(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        olds = [[p.detach().clone() for p in group["params"]] for group in rest.param_groups]
        decays = [group["weight_decay"] for group in rest.param_groups]
        for group in rest.param_groups if is_cautious else []:
            group["weight_decay"] = 0.0
        rest.step()
        with torch.no_grad():
            for p, momentum in zip(muon, momenta, strict=True):
                old = p.clone()
                p.sub_(0.02 * orthogonal_update(p.grad, momentum))
                p.sub_(0.02 * 0.1 * left * decayed(old, p, is_cautious))
            for group, of_group, decay in zip(rest.param_groups, olds, decays, strict=True):
                for p, old in zip(group["params"], of_group, strict=True) if is_cautious else []:
                    p.sub_(group["lr"] * decay * decayed(old, p, True))
        model.zero_grad()
        rows.append([loss.item(), norm.item()])
    return rows, layers


def layers_of(model: torch.nn.Module) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, p in model.named_parameters():
        layer = name.rpartition(".")[0] or name  # of this model, each module is one
        if p.grad is not None:
            squares[layer] = squares.get(layer, 0.0) + p.grad.double().square().sum().item()
    return {layer: square**0.5 for layer, square in squares.items()}


def decayed(old: torch.Tensor, new: torch.Tensor, is_cautious: bool | str) -> torch.Tensor:
    """The weights that decay: all, or those that the update moved towards zero (Chen et al. 2025,
    arXiv 2510.12402)."""
    return old * (((old - new) * old > 0) | (not is_cautious))


class Lion:
    """Algorithm 2 of Chen et al. 2023 (arXiv 2302.06675), line by line."""

    def __init__(self, groups, betas):
        self.betas = betas
        self.param_groups = groups
        self.moments = [[torch.zeros_like(p) for p in g["params"]] for g in groups]

    @torch.no_grad()
    def step(self):
        b1, b2 = self.betas
        for group, moments in zip(self.param_groups, self.moments, strict=True):
            for p, m in zip(group["params"], moments, strict=True):
                update = torch.sign(b1 * m + (1 - b1) * p.grad)
                p -= group["lr"] * (update + group["weight_decay"] * p)
                m.copy_(b2 * m + (1 - b2) * p.grad)


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
    for case, (rows, layers) in zip(cases, results, strict=True):
        losses, expected_layers = plain_losses(case[1], clip=2.0)
        assert layers == pytest.approx(expected_layers, rel=1e-3, abs=1e-5), case
        expected = torch.tensor(losses)
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
    for case, (plain, rows) in zip(
        cases, ranks.run("step_scenarios:dropped", 2, cases=cases), strict=True
    ):
        assert rows == plain, case


def test_a_gradient_that_is_not_finite_is_not_applied():
    cases = [[s, k, p] for s in range(4) for k in ("adamw", "muon") for p in ("fp32", "bf16")]
    for case, (rows, plain, applied) in zip(
        cases, ranks.run("step_scenarios:not_finite", 2, cases=cases), strict=True
    ):
        assert not applied, case
        assert rows == plain, case


def test_a_models_own_numbers_are_means_over_ranks():
    extra, largest, error = ranks.run("step_scenarios:extra", 2)
    assert largest[0] != largest[1]
    assert extra == {"rank": 0.5, "largest": sum(largest) / 2}
    assert "the names: differ between ranks (here: of rank 0)" in error


@pytest.mark.parametrize("size", [1, 3])
def test_matrices_that_are_whole_one_after_the_other_train_alike(size):
    at_once, alone = ranks.run("step_scenarios:waves", size, wholes=[64 << 20, 1])
    assert at_once == alone
