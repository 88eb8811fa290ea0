"""A mixture of experts beside a plain loop over tokens, and what its balance adds and counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from forescale.models import Transformer
from forescale.models.flops import count, flops_6n, flops_per_token
from forescale.models.mlps.grouped import GroupedLinear
from forescale.models.mlps.moe_module import gated
from tests.models.configs import changed, model_config

V, E, K = 61, 6, 2
BASE = model_config(
    num_layers=2,
    width=32,
    num_heads=4,
    vocab_size=V,
    max_sequence_length=24,
    mlp="moe",
    mlp_width=48,
    mlp__experts=E,
    mlp__top_k=K,
    init_std=0.3,
)
CHOICES = {
    "softmax": BASE,
    "softmax-raw": changed(BASE, mlp__renormalise=False),
    "sigmoid": changed(BASE, mlp__scores="sigmoid"),
    "sigmoid-raw-bias": changed(
        BASE, mlp__scores="sigmoid", mlp__renormalise=False, mlp__bias_speed=0.01
    ),
    "shared": changed(BASE, mlp__shared=2, mlp__expert_width=20),
    "all": changed(BASE, mlp__top_k=E, mlp__expert_width=20),
}


def build(config=BASE):
    torch.manual_seed(0)
    return Transformer(config)


def layer(config=BASE):
    torch.manual_seed(0)
    config = config.resolved()
    return config.mlp.build(config)


def tokens(rows=3, length=24):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(3))


def hidden(rows=2, length=12):
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(4))


def plainly(moe, x_D):
    """One token, by the definition."""
    c = moe.part
    logits_E = moe.router.weight @ x_D
    scores_E = logits_E.softmax(-1) if c.scores == "softmax" else logits_E.sigmoid()
    ranked_E = scores_E if moe.bias_steps is None else scores_E + c.bias_speed * moe.bias_steps
    chosen = ranked_E.argsort(descending=True)[: c.top_k].tolist()
    total = sum(scores_E[e] for e in chosen) if c.renormalise else 1.0
    y_D = torch.zeros_like(x_D) if moe.shared is None else moe.shared(x_D)
    for e in chosen:
        inner_F = F.silu(moe.gate.weight[e] @ x_D) * (moe.up.weight[e] @ x_D)
        y_D = y_D + scores_E[e] / total * (moe.down.weight[e] @ inner_F)
    return y_D


@pytest.mark.parametrize("name", CHOICES)
def test_it_equals_a_plain_loop_and_so_do_its_gradients(name):
    moe, x = layer(CHOICES[name]), hidden()
    if moe.bias_steps is not None:
        moe.bias_steps += torch.tensor([30, -30, 0, 60, 0, -10])
    got, _ = moe(x)
    expected = torch.stack([torch.stack([plainly(moe, x_D) for x_D in row]) for row in x])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    parameters = list(moe.parameters())
    local, peer = (torch.autograd.grad(y.square().sum(), parameters) for y in (got, expected))
    for a, b in zip(local, peer, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_grouped_products_take_empty_groups_and_give_them_zero_gradients():
    torch.manual_seed(0)
    linear, rows = GroupedLinear(4, 5, 3, 1.0), torch.randn(7, 5, requires_grad=True)
    out = linear(rows, torch.tensor([0, 4, 4, 7]))
    expected = torch.cat([rows[:4] @ linear.weight[1].T, rows[4:] @ linear.weight[3].T])
    torch.testing.assert_close(out, expected)
    target = [rows, linear.weight]
    local, peer = (torch.autograd.grad(y.square().sum(), target) for y in (out, expected))
    for a, b in zip(local, peer, strict=True):
        torch.testing.assert_close(a, b)
    assert not local[1][[0, 2]].any()
    nothing = linear(rows[:0], torch.zeros(4, dtype=torch.int64))
    nothing.sum().backward()
    assert not linear.weight.grad.any()


@pytest.mark.parametrize("name", CHOICES)
def test_it_is_counted_as_it_is(name):
    config, x = CHOICES[name], tokens(2, 24)
    model = build(changed(config, loss_chunk=0))
    idle = 2 * (E - config.mlp.top_k) * 3 * 32 * config.resolved().mlp.expert_width
    counts = count(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.active == counts.total - idle
    assert flops_6n(config) == 6 * (counts.blocks + counts.head - idle)
    # Which fused kernels of attention the counter knows depends on torch's version.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses, penalty = model(x, x)
        (losses.sum() + penalty).backward()
    assert counter.get_total_flops() == flops_per_token(config, 24) * x.numel()


def test_a_mixture_of_the_default_width_costs_what_the_dense_model_costs():
    dense = changed(BASE, mlp="swiglu")
    router = 2 * 3 * 2 * 32 * E
    assert flops_per_token(BASE, 24) == flops_per_token(dense, 24) + router


def test_the_first_layers_stay_dense():
    model = build(changed(BASE, mlp__dense_layers=1))
    assert model.blocks[0].mlp.up.weight.shape == (48, 32)
    assert model.blocks[1].mlp.up.weight.shape == (E, 24, 32)
    model(tokens(), tokens())
    assert len(model.tallies.of("experts")) == 1


# --- balance


def test_the_balance_loss_is_that_of_transformers_in_each_layer():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    moe, x = layer(changed(BASE, mlp__z_loss=0.0)), hidden()
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, 7:] = False
    logits = moe.router(x.flatten(0, 1))
    for mask in (None, real):
        peer = mixtral.load_balancing_loss_func(
            (logits,), E, K, None if mask is None else mask.long()
        )
        got = moe(x, mask)[1].penalty
        assert got.item() == pytest.approx(0.01 * peer.item() / K, rel=1e-6)
    expected, local = (
        torch.autograd.grad(loss, moe.router.weight, retain_graph=True)[0]
        for loss in (0.01 / K * peer, got)
    )
    torch.testing.assert_close(local, expected)


def test_the_router_z_loss_is_the_mean_square_of_log_z():
    moe, x = layer(changed(BASE, mlp__balance_loss=0.0)), hidden()
    z = moe.router(x[:, :9]).logsumexp(-1)
    real = (torch.arange(12) < 9).expand(2, 12)
    assert moe(x, real)[1].penalty.item() == pytest.approx(0.001 * z.square().mean().item())


def test_the_penalty_is_per_target_and_no_part_of_losses():
    model, x = build(), tokens()
    targets = x.roll(-1, 1)
    targets[0, 20:] = -100
    losses, penalty = model(x, targets)
    alone = [model(x[i : i + 1], targets[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(losses, torch.cat([row for row, _ in alone]))
    each = penalty / (3 * 24 - 4)  # two layers, each about balance_loss + z_loss * log(E)^2
    assert 0.02 < each < 0.2
    model.eval()
    torch.testing.assert_close(model(x, targets), losses)
    z = build(changed(BASE, z_loss=1e-4))
    both, without = (
        z(x, targets)[1],
        build(changed(BASE, z_loss=1e-4, mlp__balance_loss=0.0, mlp__z_loss=0.0))(x, targets)[1],
    )
    torch.testing.assert_close(both - without, penalty)


def test_padding_counts_nowhere():
    model, x = build(), tokens()
    targets = x.roll(-1, 1)
    targets[:, 16:] = -100
    other = x.clone()
    other[:, 16:] = 0
    _, first = model(x, targets)
    counts = model.tallies.counts.clone()
    assert counts.view(2, -1)[:, :E].sum(-1).tolist() == [3 * 16 * K] * 2
    model.tallies.counts.zero_()
    _, second = model(other, targets)
    torch.testing.assert_close(first, second)
    assert torch.equal(counts, model.tallies.counts)
    nothing = model(x, torch.full_like(x, -100))
    assert nothing[1] == 0
    assert not nothing[0].any()


def test_what_is_computed_again_counts_once():
    plain, again = (build(changed(BASE, activation_checkpointing=c)) for c in ("none", "full"))
    x, got = tokens(), []
    for model in (plain, again):
        losses, penalty = model(x, x)
        (losses.sum() + penalty).backward()
        got.append([penalty.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*got, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.tallies.counts, again.tallies.counts)


def test_evaluation_counts_nothing():
    model = build().eval()
    model(tokens(), tokens())
    assert not model.tallies.counts.any()


def test_metrics_of_a_step():
    model, x = build(), tokens()
    model(x, x)
    model(x.flip(0), x)
    model.counted(model.counters().clone())
    got, load = model.metrics(), model.tallies.of("experts")[:, :E].double()
    worst = (load.amax(-1) / load.mean(-1)).max()
    assert got["expert_load_worst"].item() == pytest.approx(worst.item())
    assert 1 <= got["expert_load"] <= worst
    assert got["dropped"] == 0
    moe = model.blocks[0].mlp
    with torch.no_grad():
        moe.router.weight.zero_()
        model.blocks[1].mlp.router.weight.zero_()
    model.counters().zero_()
    model(x, x)
    model.counted(model.counters().clone())
    assert model.metrics()["router_entropy"].item() == pytest.approx(math.log(E), rel=1e-5)


# --- a bias instead of a loss


BIASED = changed(
    BASE, mlp__scores="sigmoid", mlp__bias_speed=0.01, mlp__balance_loss=0.0, mlp__z_loss=0.0
)


def test_the_bias_follows_the_load_and_balances_it():
    model, x = build(BIASED), tokens()
    first = None
    for _ in range(150):
        model.counters().zero_()
        model(x, x)
        model.counted(model.counters().clone())
        load = model.tallies.total("experts")[:, :E]
        before = [block.mlp.bias_steps.clone() for block in model.blocks]
        model.updated()
        for block, old, counts in zip(model.blocks, before, load, strict=True):
            assert (block.mlp.bias_steps - old).tolist() == [
                (counts.sum() > E * n).int().item() - (counts.sum() < E * n).int().item()
                for n in counts
            ]
        first = first or model.metrics()["expert_load"].item()
    assert first > 1.3
    assert model.metrics()["expert_load"] < 1.2


def test_the_bias_is_in_the_state_and_no_precision_rounds_it():
    model = build(BIASED)
    names = [name for name in model.state_dict() if name.endswith("bias_steps")]
    assert len(names) == 2
    assert not [name for name in model.state_dict() if "tallies" in name]
    model.blocks[0].mlp.bias_steps += 12_345
    assert model.bfloat16().blocks[0].mlp.bias_steps.tolist() == [12_345] * E


# --- capacity


def test_a_capacity_drops_what_has_no_place_in_training_only():
    moe, x = layer(changed(BASE, mlp__capacity=1.0)), hidden(2, 12)
    with torch.no_grad():  # all tokens want expert 2 most, and then expert 4
        moe.router.weight.zero_()
        moe.router.weight[2, 0], moe.router.weight[4, 0] = 2.0, 1.0
        x[..., 0] = 1.0
        got, routing = moe(x)
        places = 24 * K // E
        assert routing.counts[:E].tolist() == [0, 0, 24, 0, 24, 0]
        assert routing.counts[E] == 2 * (24 - places)
        free = layer(BASE)
        free.load_state_dict(moe.state_dict())
        whole, _ = free(x)
        flat, expected = got.flatten(0, 1), whole.flatten(0, 1)
        torch.testing.assert_close(flat[:places], expected[:places])
        assert not flat[places:].any()
        torch.testing.assert_close(moe.eval()(x)[0], whole)
        moe.train()
        real = torch.ones(2, 12, dtype=torch.bool)
        real[0] = False  # padding takes no place
        flat, routing = moe(x, real)
        torch.testing.assert_close(flat[1, :places], whole[1, :places])
        assert routing.counts[E] == 2 * (12 - places)


@pytest.mark.parametrize("causal", [True, False])
def test_a_target_sees_no_token_without_an_expert_where_there_is_room_for_all(causal):
    """Behind the last target a causal model has nothing to see; an encoder has."""
    model, x = build(changed(BASE, causal=causal, mlp__capacity=E / K)), tokens()
    targets = torch.full_like(x, -100)
    targets[:, 5] = x[:, 5]
    trained, _ = model.train()(x, targets)
    torch.testing.assert_close(trained, model.eval()(x, targets), rtol=1e-5, atol=1e-5)


def test_enough_capacity_drops_nothing():
    free, roomy = layer(), layer(changed(BASE, mlp__capacity=E / K))
    x = hidden()
    (a, first), (b, second) = free(x), roomy(x)
    torch.testing.assert_close(a, b)
    assert torch.equal(first.counts, second.counts)
    local, peer = (
        torch.autograd.grad(y.square().sum(), list(m.parameters()))
        for y, m in ((a, free), (b, roomy))
    )
    for one, other in zip(local, peer, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- compilation and config


@pytest.mark.parametrize(
    "change", [{}, {"mlp__capacity": 1.0}, {"activation_checkpointing": "full"}], ids=str
)
@pytest.mark.slow  # seconds each
def test_it_compiles_as_one_graph(change):
    torch._dynamo.reset()
    model, x = build(changed(BASE, **change)), tokens()
    parameters = list(model.parameters())

    def gradients(of):
        losses, penalty = of(x, x)
        return torch.autograd.grad(losses.sum() + penalty, parameters)

    expected = gradients(model)
    counts = model.tallies.counts.clone()
    model.tallies.counts.zero_()
    got = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for local, peer in zip(got, expected, strict=True):
        torch.testing.assert_close(local, peer, rtol=1e-3, atol=1e-3)
    assert torch.equal(counts, model.tallies.counts)


def test_a_gate_that_is_made_again_has_the_bits_of_silu_and_a_product():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.to(dtype).requires_grad_() for t in torch.randn(2, 5, 7)]
        expected, fused = F.silu(inputs[0]) * inputs[1], gated(*inputs)
        assert torch.equal(fused, expected)
        assert sum(t.numel() for t in fused.grad_fn.saved_tensors) == 2 * fused.numel()
        grads = [torch.autograd.grad(y, inputs, torch.ones_like(y)) for y in (expected, fused)]
        assert all(map(torch.equal, *grads))
