"""Parts compiled alone give the same gradients, block after block; a missing compiler is named."""

import pytest
import torch

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.engine import compilation as module
from forescale.engine.compilation import compilation, compile_parts, compiler_missing
from forescale.models import ModelConfig, Transformer

SIZES = dict(num_layers=3, width=32, num_heads=2, vocab_size=50, max_sequence_length=16)


def job(*words):
    return compose(TrainJob, ["train.steps=1", "schedule.warmup=0", *words])


def test_what_is_compiled_on_which_device(monkeypatch):
    monkeypatch.setattr(module, "compiler_missing", lambda: None)
    assert compilation(job(), 1, "cpu") == (True, False, None)
    assert compilation(job(), 2, "cpu") == compilation(job(), 1, "cuda") == (True, True, None)
    assert compilation(job("engine=zero3"), 2, "cpu") == (True, True, None)
    assert compilation(job("train.compile=off"), 2, "cpu") == (False, False, None)
    own = ("engine=zero3", "model=custom", "model._target_=a.B")
    assert not compilation(job(*own), 2, "cpu").wanted
    assert compilation(job(*own, "train.compile=on"), 2, "cpu").wanted


@pytest.mark.parametrize(
    ("on_gpu", "variable", "words"),
    [(False, "CXX", r"a C\+\+ compiler \(no-such\)"), (True, "CC", r"a C compiler \(no-such\)")],
)
def test_each_device_needs_its_own_compiler(monkeypatch, on_gpu, variable, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setenv(variable, "no-such")
    missing = compiler_missing()
    assert missing is not None
    assert compilation(job(), 1, "cpu").notice.endswith(f"this machine lacks {missing}.")
    with pytest.raises(Exception, match=f"lacks {words}"):
        compilation(job("train.compile=on"), 1, "cpu")


def arrivals(model) -> list[int]:
    """Watch a backward pass: how many parameters have a gradient when that of each block's output
    comes, from the last block to the first, and how many do at the end of the list."""
    arrived, found = [], []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(arrived.append)

    def watch(_, __, output):
        x = output[0] if isinstance(output, tuple) else output
        x.register_hook(lambda _: found.append(len(arrived)))

    for block in model.blocks:
        block.register_forward_hook(watch)
    return found


@pytest.mark.slow  # seconds each
@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(mtp_layers=1, tie_embeddings=True, z_loss=1e-4),
        dict(mlp="moe", activation_checkpointing="full"),
        dict(activation_checkpointing="selective"),
        dict(mlp="moe", activation_checkpointing="selective"),
    ],
    ids=str,
)
def test_parts_give_gradients_early_and_equal_those_without(change):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES, **change))
    rows = torch.randint(0, 50, (2, 17))

    def total(of):
        found = of(rows[:, :-1], rows[:, 1:])
        losses, penalty = found if isinstance(found, tuple) else (found, 0.0)
        return losses.sum() + penalty

    expected = torch.autograd.grad(total(model), list(model.parameters()))
    assert compile_parts(model, backend="aot_eager")
    found = arrivals(model)
    total(model).backward()
    behind = [len(list(block.parameters())) for block in model.blocks[::-1]]
    assert [n - found[0] for n in found] == [sum(behind[:i]) for i in range(3)]
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)
