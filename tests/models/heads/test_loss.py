"""The chunked loss is the plain one, in value and gradient, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from forescale.models import ModelConfig, Transformer
from forescale.models.heads import loss
from forescale.models.heads.loss import IGNORE, window_losses

B, L, D, V = 3, 10, 8, 50


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, L, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (B, L), generator=generator)
    targets[0, :4] = targets[2, -1] = IGNORE
    return hidden, weight, targets


def plain(hidden, weight, targets, z_loss, softcap=0.0):
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(-1)
    log_z = logits.logsumexp(-1)
    return losses, z_loss * (log_z.square() * (targets != IGNORE)).sum()


@pytest.mark.parametrize("chunk", [0, 1, 7, 30, 64])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, 0.0), (0.3, 0.0), (0.3, 3.0)])
def test_value_and_gradient_equal_plain_cross_entropy(chunk, z_loss, softcap):
    weights = torch.tensor([0.5, -2.0, 3.0])  # a gradient that differs from window to window
    hidden, weight, targets = inputs(torch.float32)
    got = window_losses(hidden, weight, targets, chunk, z_loss, softcap)
    losses, penalty = got if z_loss else (got, 0.0)
    assert losses.dtype == torch.float32
    assert losses.shape == (B,)
    gradients = torch.autograd.grad((losses * weights).sum() + penalty, (hidden, weight))

    hidden, weight, targets = inputs(torch.float64)
    expected, expected_penalty = plain(hidden, weight, targets, z_loss, softcap)
    expected_gradients = torch.autograd.grad(
        (expected * weights).sum() + expected_penalty, (hidden, weight)
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    if z_loss:
        torch.testing.assert_close(penalty.double(), expected_penalty, rtol=1e-5, atol=1e-5)
    for local, peer in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(local.double(), peer, rtol=1e-4, atol=1e-5)


def test_nothing_but_targets_counts():
    hidden, weight, targets = inputs(torch.float32)
    targets[:] = IGNORE
    losses, penalty = window_losses(hidden, weight, targets, 7, 0.1)
    (losses.sum() + penalty).backward()
    assert losses.abs().sum() == 0
    assert penalty == 0
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


def test_a_target_outside_the_vocabulary_is_an_error():
    hidden, weight, targets = inputs(torch.float32)
    targets[1, 1] = -1
    with pytest.raises((RuntimeError, IndexError)):
        window_losses(hidden, weight, targets, 7)


class Largest(TorchDispatchMode):
    """Remembers the most values that any single operation's result had."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.values = max(self.values, x.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_logits_are_never_held(dtype):
    sizes = dict(num_layers=1, width=16, num_heads=2, vocab_size=5000, max_sequence_length=64)
    x = torch.zeros(4, 64, dtype=torch.long)
    largest = {}
    for chunk in (0, 32):
        model = Transformer(ModelConfig(**sizes, loss_chunk=chunk, z_loss=0.1)).to(dtype)
        with Largest() as mode:
            losses, penalty = model(x, x)
            (losses.sum() + penalty).backward()
        largest[chunk] = mode.values
    assert largest[0] == 4 * 64 * 5000
    assert largest[32] == 32 * 5000


def test_chunks_add_up_their_gradients_in_fp32():
    """In bf16 600 chunks, each far below their sum, would mostly be rounded away."""
    hidden, weight, targets = inputs(torch.bfloat16)
    hidden, targets = hidden.repeat(1, 200, 1), targets.repeat(1, 200)
    window_losses(hidden, weight, targets, 10).sum().backward()
    exact = weight.detach().double().requires_grad_()
    plain(hidden.double(), exact, targets, 0.0)[0].sum().backward()
    error = (weight.grad - exact.grad).norm() / exact.grad.norm()
    assert error < 4e-3  # one rounding to bf16 is 2e-3


def test_bf16_loss_is_summed_in_fp32():
    """A window's sum is far above where bf16 could still resolve one token's loss."""
    hidden, weight, targets = inputs(torch.bfloat16)
    hidden, targets = hidden.repeat(1, 200, 1), targets.repeat(1, 200)
    losses = window_losses(hidden, weight, targets, 64)
    expected, _ = plain(hidden.double(), weight.double(), targets, 0.0)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.slow  # compiles
# 100: of more chunks than have products at once too
@pytest.mark.parametrize(("chunk", "as_on_a_gpu"), [(512, False), (100, True)])
def test_compiled_gradients_are_right_where_the_last_chunk_is_smaller(
    chunk, as_on_a_gpu, monkeypatch
):
    """With kernels that are deterministic, as in training, where torch 2.13's own scatter_add gives
    gradients of 1e8."""
    torch._dynamo.reset()
    if as_on_a_gpu:
        monkeypatch.setattr(loss, "_saves_memory", lambda x: torch.compiler.is_compiling())
    torch.manual_seed(0)
    sizes = dict(num_layers=1, width=64, num_heads=4, vocab_size=512, max_sequence_length=192)
    model = Transformer(ModelConfig(**sizes, loss_chunk=chunk))
    x, targets = torch.randint(0, 512, (2, 4, 192))
    targets[0, :5] = IGNORE
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        both = [
            torch.autograd.grad(run(x, targets).sum() / x.numel(), [*model.parameters()])
            for run in (model, torch.compile(model))
        ]
    finally:
        torch.use_deterministic_algorithms(was)
    for local, peer in zip(*both, strict=True):
        torch.testing.assert_close(local, peer, rtol=1e-4, atol=1e-5)
