"""Names, sizes and FLOPs of adapters against models that have them, and against torch's counter."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from forescale.config.sections.lora import LoraConfig
from forescale.models import Transformer
from forescale.models.adapters import (
    candidates,
    flops_forward_with_adapters,
    flops_recomputed_with_adapters,
    flops_with_adapters,
    is_adapter,
    is_target,
    num_adapters,
    stored_name,
    with_adapters,
)
from forescale.train.model import adapting, freeze
from tests.models.configs import changed, model_config

BASE = model_config(
    num_layers=2, width=24, num_heads=3, mlp_width=40, vocab_size=70, max_sequence_length=16
)
MIXERS = ["attention", "window", "latent", "gated_deltanet", "lstm", "mingru"]
VARIANTS = [
    changed(BASE, bias=True, norm="layernorm", mixer__gate="channel"),
    changed(
        BASE, mlp="moe", mlp__expert_width=13, mlp__shared=1, mtp_layers=1, tie_embeddings=True
    ),
    changed(BASE, num_layers=6, mixer_pattern=MIXERS, mixer__window=5),
    changed(BASE, encoder_layers=2, source_length=8),
]
RANK = 3


def built(config, *targets, stage=1, rank=RANK):
    lora = LoraConfig(rank, targets=list(targets))
    train, engine = SimpleNamespace(seed=1, init_seed=None), SimpleNamespace(stage=stage)
    job = SimpleNamespace(model=config, lora=lora, train=train, engine=engine)
    model = Transformer(config, adapting(job, None))
    freeze(job, model)
    return model


@pytest.mark.parametrize("config", VARIANTS, ids=["biases", "experts", "mixers", "encoder"])
@pytest.mark.parametrize("targets", [(), ("query", "mlp.up")], ids=["all", "some"])
def test_parameters_are_those_of_the_model_in_its_order(config, targets):
    got = {stored_name(n): p for n, p in built(config, *targets).named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in got.items()}
    assert list(with_adapters(config, RANK, targets).items()) == list(shapes.items())
    trained = {name: p for name, p in got.items() if p.requires_grad}
    assert trained.keys() == {name for name in got if is_adapter(name)}
    assert sum(p.numel() for p in trained.values()) == num_adapters(config, RANK, targets)


def test_targets_are_named_by_a_whole_name_a_last_part_or_a_part_of_the_block():
    names = candidates(changed(BASE, mixer__gate="head"))
    assert names[:2] == ["mixer.query", "mixer.key"]
    assert [n for n in names if is_target(n, ["gate"])] == ["mixer.gate", "mlp.gate"]
    assert [n for n in names if is_target(n, ["mlp.gate", "key"])] == ["mixer.key", "mlp.gate"]
    assert [n for n in names if is_target(n, ["mlp"])] == ["mlp.gate", "mlp.up", "mlp.down"]
    assert [n for n in names if is_target(n, [])] == names


def counted(config, length, *targets, kernel=SDPBackend.MATH):
    """Forward and backward FLOPs of a token as torch counts them, with a gradient of the first
    block's input."""
    model, tokens = built(config, *targets, stage=3), torch.randint(0, 70, (2, length))
    with sdpa_kernel(kernel), FlopCounterMode(display=False) as counter:
        got = model(tokens, tokens)
        losses, penalty = got if isinstance(got, tuple) else (got, 0.0)
        (losses.sum() + penalty).backward()
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize("config", [BASE, *VARIANTS[:2]], ids=["plain", "biases", "experts"])
def test_flops_are_those_that_torch_counts(config):
    """Where the first block's input has a gradient, as at stage 3."""
    length = 16
    assert counted(config, length) == flops_with_adapters(config, length, RANK, [])
    model = built(config).eval()
    tokens, kernel = torch.randint(0, 70, (2, length)), sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), kernel, FlopCounterMode(display=False) as counter:
        model(tokens)
    forward = flops_forward_with_adapters(config, length, RANK, [])
    assert counter.get_total_flops() / tokens.numel() == forward


@pytest.mark.parametrize("targets", [(), ("query", "mlp.up")], ids=["all", "some"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("chunk", [None, 8])
def test_flops_of_what_is_computed_twice_are_those_that_torch_counts(checkpointing, chunk, targets):
    """But for what nothing needs: the last product of what is made again, and of an MLP in chunks
    in a layer that is made again the last chunk."""
    plain = changed(BASE, loss_chunk=0)
    config = changed(plain, activation_checkpointing=checkpointing, mlp__chunk=chunk)
    price = flops_with_adapters(config, 16, RANK, targets)
    price += flops_recomputed_with_adapters(config, 16, RANK, targets)
    last = 2 * 24 * (40 if targets else RANK)  # of mlp.down, or of its adapter
    mlp = 2 * (3 * 24 * 40 + RANK * (24 + 40) * (1 if targets else 3))
    if chunk is not None:
        price -= config.num_layers * last
    if checkpointing == "full":
        price -= config.num_layers * (last if chunk is None else mlp * chunk / 16)
    assert counted(config, 16, *targets) == price


def test_selective_checkpointing_makes_no_product_of_adapters_again():
    """With flash attention, whose results are kept, and which torch doesn't count."""
    plain = changed(BASE, loss_chunk=0)
    config = changed(plain, activation_checkpointing="selective")
    flash = SDPBackend.FLASH_ATTENTION
    assert counted(config, 16, kernel=flash) == counted(plain, 16, kernel=flash)
    assert flops_recomputed_with_adapters(config, 16, RANK, []) == 0


def test_they_begin_with_the_model_as_it_was_and_depend_on_the_seed_alone():
    torch.manual_seed(0)
    plain = Transformer(BASE)
    torch.manual_seed(0)
    model = built(BASE)
    tokens = torch.randint(0, 70, (2, 16))
    assert torch.equal(model(tokens), plain(tokens))
    from forescale.models.init import Undrawn

    with Undrawn():
        other = built(BASE)
    mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
    peer = dict(other.named_parameters())
    assert all(torch.equal(p, peer[n]) for n, p in mine.items())
    downs = [p for n, p in mine.items() if ".lora_A." in n]
    assert all(0.5 < p.abs().max() * p.shape[1] ** 0.5 <= 1 for p in downs)
    assert not torch.equal(downs[0], downs[1])
