"""The gated delta rule in chunks against its definition, with gradients. Others' code:
test_gated_deltanet.py."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from forescale.models.mixers.delta_rule import DeltaRule, delta_rule

LENGTHS = [1, 2, 63, 64, 65, 100, 192]


def inputs(length, dtype=torch.float64, rows=2, heads=3, K=8, V=5, resets=0.2):
    make = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=make)  # noqa: E731
    q, k, v = (
        draw(rows, length, heads, K),
        draw(rows, length, heads, K),
        draw(rows, length, heads, V),
    )
    log_decay, beta = -draw(rows, length, heads).exp(), draw(rows, length, heads).sigmoid()
    keep = (torch.rand(rows, length, generator=make) >= resets).to(dtype)
    args = [x.to(dtype).requires_grad_() for x in (q, k, v, log_decay, beta)]
    return [*args, keep]


def step_by_step(q, k, v, log_decay, beta, keep, state=None):
    """The definition, one token after the other; also the last state."""
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    B, L, H, K = q.shape
    state = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    got = []
    for t in range(L):
        state = state * (log_decay[:, t].exp() * keep[:, t, None])[..., None, None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv,bh->bhkv", k[:, t], error, beta[:, t])
        got.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * K**-0.5)
    return torch.stack(got, 1), state


def gradients(form, args):
    weights = torch.linspace(-1, 1, args[2].numel(), dtype=args[2].dtype).view_as(args[2])
    return torch.autograd.grad((form(*args) * weights).sum(), args[:5])


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_the_definition(length):
    args = inputs(length)
    torch.testing.assert_close(DeltaRule.apply(*args), step_by_step(*args)[0])
    single = [x.detach().float() for x in args]
    torch.testing.assert_close(
        DeltaRule.apply(*single), step_by_step(*args)[0].float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_equal_those_of_the_definition(length):
    args = inputs(length)
    expected = gradients(lambda *args: step_by_step(*args)[0], args)
    torch.testing.assert_close(gradients(DeltaRule.apply, args), expected)
    torch.testing.assert_close(gradients(lambda *args: delta_rule(*args)[0], args), expected)
    single = [x.detach().float().requires_grad_(i < 5) for i, x in enumerate(args)]
    for got, target in zip(gradients(DeltaRule.apply, single), expected, strict=True):
        scale = max(1, target.abs().max().item())
        torch.testing.assert_close(got / scale, target.float() / scale, rtol=1e-5, atol=1e-5)


def test_a_state_is_carried_from_call_to_call():
    args = [x.detach() for x in inputs(100)]
    whole, last = step_by_step(*args)
    got, state = [], None
    for a, b in ((0, 1), (1, 70), (70, 71), (71, 100)):
        o, _, state = delta_rule(*(x[:, a:b] for x in args), state)
        got.append(o)
    torch.testing.assert_close(torch.cat(got, 1), whole)
    torch.testing.assert_close(state, last)


def test_not_a_bit_of_another_document_arrives():
    args = [x.detach().float() for x in inputs(100, resets=0)]
    args[5][:, 40] = 0
    other = [x.clone() for x in args]
    for x in other[:3]:
        x[:, :40] = 1e6 * torch.randn_like(x[:, :40])
    other[3][:, :41], other[4][:, :40] = -1e9, 0.5  # the decay at the first token plays no part
    one, two = DeltaRule.apply(*args), DeltaRule.apply(*other)
    assert torch.equal(one[:, 40:], two[:, 40:])


@pytest.mark.parametrize("log_decay", [-1e30, -300.0, -1e-30, 0.0])
def test_no_decay_overflows(log_decay):
    args = inputs(130)
    args[3] = torch.full_like(args[3], log_decay).requires_grad_()
    single = [x.detach().float().requires_grad_(i < 5) for i, x in enumerate(args)]
    got = DeltaRule.apply(*single)
    torch.testing.assert_close(got, step_by_step(*args)[0].float(), rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in gradients(DeltaRule.apply, single))


@pytest.mark.slow  # compiles
def test_a_longer_sequence_is_no_larger_graph():
    """Unrolled, the loop over chunks would make a first step at 16,384 tokens take for ever."""
    sizes: dict[int, list[int]] = {}
    for length in (128, 448):
        args = inputs(length)
        expected = gradients(DeltaRule.apply, args)
        nodes = sizes.setdefault(length, [])

        def counted(graph, _, nodes=nodes):
            nodes.append(len(graph.graph.nodes))
            return make_boxed_func(graph)

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=counted)  # the backward graph's too
        compiled = torch.compile(
            lambda *args: DeltaRule.apply(*args), backend=backend, fullgraph=True, dynamic=False
        )
        torch.testing.assert_close(gradients(compiled, args), expected)
    assert sizes[128] == sizes[448]
    assert len(sizes[128]) == 2
