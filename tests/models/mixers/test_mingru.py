"""minGRU: its parallel form, its gradients and its start."""

import pytest
import torch

from forescale.models import ModelConfig, Transformer
from forescale.models.mixers.mingru_module import Recurrence

CONFIG = ModelConfig(num_layers=2, width=64, num_heads=1, vocab_size=32, max_sequence_length=64,
                     mixer="mingru")  # fmt: skip


def step_by_step(logit, value, keep):
    """The definition, one token after the other."""
    z, h, got = torch.sigmoid(logit), torch.zeros_like(value[:, 0]), []
    for t in range(value.shape[1]):
        h = (1 - z[:, t]) * keep[:, t] * h + z[:, t] * value[:, t]
        got.append(h)
    return torch.stack(got, 1)


def inputs(length, dtype=torch.float64, batch=2, width=3):
    torch.manual_seed(length)
    logit, value = (torch.randn(batch, length, width, dtype=dtype) for _ in range(2))
    keep = (torch.rand(batch, length, 1) > 0.2).to(dtype)
    return logit.requires_grad_(), value.requires_grad_(), keep


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
def test_the_parallel_form_equals_the_definition(length):
    args = inputs(length)
    torch.testing.assert_close(Recurrence.apply(*args), step_by_step(*args))
    single = [x.float() for x in args]
    want = step_by_step(*args).float()
    torch.testing.assert_close(Recurrence.apply(*single), want, rtol=1e-5, atol=1e-5)


def test_the_gradients_are_those_of_the_definition():
    args = inputs(9)
    assert torch.autograd.gradcheck(Recurrence.apply, args)
    local, peer = (
        torch.autograd.grad(form(*args).square().sum(), args[:2])
        for form in (Recurrence.apply, step_by_step)
    )
    torch.testing.assert_close(local, peer)


def test_channels_begin_with_memories_from_one_token_to_the_longest_sequence():
    decay = Transformer(CONFIG).blocks[0].mixer.log_memory.exp()
    assert decay[0] == 1
    assert decay[-1].item() == pytest.approx(64)
