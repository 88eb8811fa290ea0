"""Cautious decay is the paper's formula, around any optimizer."""

import pytest
import torch

from forescale.config.sections.optimizer import AdamWConfig, LionConfig, MuonConfig
from forescale.engine.optim import build_optimizer, parameter_groups


def updated(config, weights, steps=3):
    """The weights after some steps; their gradients are drawn anew for each."""
    names = {f"w{i}": torch.nn.Parameter(w.clone()) for i, w in enumerate(weights)}
    groups = [g.as_dict() for g in parameter_groups(names.items(), config)]
    optimizer = build_optimizer(config, groups)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in names.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in names.values()]


@pytest.mark.parametrize("kind", [AdamWConfig, LionConfig, MuonConfig])
def test_a_weight_decays_only_where_its_update_moves_it_towards_zero(kind):
    torch.manual_seed(0)
    weights = [torch.randn(6, 4), torch.randn(5)]
    keys = {"learning_rate": 0.01, "weight_decay": 0.5}
    (plain, _), (none, bias), (cautious, same) = (
        updated(kind(**keys | other), weights, 1)
        for other in ({}, {"weight_decay": 0.0}, {"cautious_decay": True})
    )
    old = weights[0]
    towards = (old - none) * old > 0
    assert 0 < towards.float().mean() < 1
    torch.testing.assert_close(cautious[~towards], none[~towards])
    torch.testing.assert_close(cautious[towards], (none - 0.01 * 0.5 * old)[towards])
    torch.testing.assert_close(plain, none - 0.01 * 0.5 * old)
    assert torch.equal(same, bias), "biases never decay"


def test_it_goes_on_over_steps():
    torch.manual_seed(0)
    weights = [torch.randn(6, 4)]
    (plain,), (cautious,) = (
        updated(MuonConfig(weight_decay=0.5, cautious_decay=on), weights) for on in (False, True)
    )
    assert cautious.norm() > plain.norm()
