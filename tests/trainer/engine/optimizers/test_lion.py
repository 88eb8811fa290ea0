"""Lion's updates of several parameters at once against those of each by itself."""

import torch

from forescale.engine.optimizers.lion import Lion, _together


def test_updates_together_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(3, 5), (40,), (7,), (2, 2)]]
    params = [torch.nn.Parameter(x.clone()) for x in start]
    optimizer = Lion(params, lr=0.1, betas=(0.9, 0.98))
    optimizer.param_groups[0]["weight_decay"] = 0.3
    momenta = [torch.zeros_like(x) for x in start]
    for _ in range(3):
        for p, x, momentum in zip(params, start, momenta, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            x.mul_(1 - 0.1 * 0.3).add_(torch.lerp(p.grad, momentum, 0.9).sign_(), alpha=-0.1)
            momentum.lerp_(p.grad, 1 - 0.98)
        optimizer.step()
    assert all(torch.equal(p.data, x) for p, x in zip(params, start, strict=True))


def test_what_is_updated_together_is_no_larger_than_the_largest():
    params = [torch.zeros(n) for n in (3, 4, 10, 2, 8, 1)]
    assert [[p.numel() for p in run] for run in _together(params)] == [[3, 4], [10], [2, 8], [1]]
    assert list(_together([])) == []
