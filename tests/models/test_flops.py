"""Parameters against the model itself, FLOPs against torch's own counter, to the last one."""

from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from forescale.models import Transformer
from forescale.models.choices import NORMS
from forescale.models.flops import (
    count,
    flops_6n,
    flops_per_token,
    flops_recomputed,
    matrices,
    shapes,
)
from forescale.models.mlps import MLPS
from forescale.models.parametrization import factors
from forescale.models.positions.kinds import POSITIONS
from tests.matrix import FULL
from tests.models.checks import objective
from tests.models.configs import changed, model_config

BASE = model_config(
    num_layers=2, width=24, num_heads=3, mlp_width=40, vocab_size=70, max_sequence_length=16
)
VARIANTS = [
    changed(
        BASE, position=p, norm=n, mlp=m, bias=b, mixer__qk_norm=q, num_kv_heads=g, tie_embeddings=t
    )
    for p, n, m, b, q, g, t in product(
        POSITIONS, NORMS, MLPS, (False, True), ("none", "head"), (None, 1), (False, True)
    )
    if not (m == "moe" and b)  # experts have no biases
]

VARIANTS += [
    changed(BASE, norm__placement="post", mixer__qk_norm="layer", num_kv_heads=1),
    changed(BASE, norm__placement="sandwich", mlp="geglu", scale_embedding=True, bias=True),
    changed(BASE, mixer__gate="head", head__softcap=30.0, position__fraction=0.5),
    changed(BASE, mixer__gate="channel", bias=True),
    changed(BASE, head_dim=14, num_kv_heads=1, mixer__qkv_bias=True, mixer__gate="channel"),
    changed(BASE, head_dim=12, mixer__qk_norm="layer", mixer_pattern=["attention", "latent"]),
    changed(BASE, head_dim=20, mixer_pattern=["latent", "window"], mixer__window=5),
    changed(BASE, mixer__value_residual=0.5, num_kv_heads=1, bias=True),
    changed(
        BASE,
        num_layers=3,
        mixer__token_shift=True,
        value_embedding=2,
        num_kv_heads=1,
        parametrization="mup",
    ),
    changed(BASE, mtp_layers=2, bigram_rows=31, tie_embeddings=True, norm="layernorm", bias=True),
    changed(BASE, mtp_layers=1, mlp="moe", parametrization="completep"),
    changed(BASE, norm__placement="parallel", norm="layernorm", bias=True, head__bias=True),
    changed(BASE, norm__placement="shared", head__bias=True, tie_embeddings=True, mlp="moe"),
    changed(BASE, norm="layernorm", norm__gain=False, bias=True, mixer__theta=0.0),
]
# Those whose outer parts differ from the others'.
OUTER = [
    changed(BASE, norm="layernorm", bias=True, head="dense", norm__embedding=True, **options)
    for options in (
        dict(norm__placement="residual", tie_embeddings=True, causal=False, position="learned"),
        dict(parametrization="mup", position="relative"),
    )
]


# Every third variant meets every pair of choices.
SOME = VARIANTS if FULL else [*VARIANTS[:-11:3], *VARIANTS[-11:]]


def test_parameters_of_every_variant():
    for config in SOME:
        model, counts = Transformer(config), count(config)
        sizes = {name: p.numel() for name, p in model.named_parameters()}

        def under(prefix, sizes=sizes):
            return sum(n for name, n in sizes.items() if name.startswith(prefix))

        assert counts.total == sum(sizes.values())
        assert counts.embedding == under("embedding.weight")
        assert counts.tables == under("bigrams.") + under("value_embeddings.")
        assert counts.position == under("position.") + under("relative_position.")
        assert counts.blocks == under("blocks.")
        biases = sizes.get("embedding.bias", 0) + sizes.get("head.bias", 0)
        assert counts.non_embedding == under("blocks.") + under("norm.") + biases
        assert counts.transform == biases
        assert counts.mtp == under("mtp.")
        table = "embedding.weight" if config.tie_embeddings else "head.weight"
        assert counts.head == sizes[table]
        idle = counts.total - counts.mtp - counts.active
        assert (idle > 0) == (config.mlp.is_routed)
        assert flops_6n(config) == 6 * (counts.blocks + counts.head + biases - idle)


def test_shapes_are_those_of_the_model_in_its_order():
    for config in SOME + OUTER:
        model = Transformer(config)
        assert count(config).total == sum(p.numel() for p in model.parameters())
        if config.parametrization.kind != "standard":
            assert factors(config).keys() == shapes(config).keys()
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert list(shapes(config).items()) == list(expected.items())
        assert matrices(config) == model.muon_parameters()


def counted(config, B, L):
    """Forward and backward FLOPs as torch counts them.

    Attention runs as plain matrix products here: torch's counter knows no formula for the CPU's
    flash kernel, and would count the scores that a flash kernel's backward makes again.
    """
    model, x = Transformer(config), torch.zeros(B, L, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(model(x, x)).backward()
    return counter.get_total_flops()


def test_flops_of_every_choice_exactly():
    """Every thirteenth variant: that meets every pair of choices."""
    B, L = 2, 16
    for config in [*VARIANTS[:-11:13], *VARIANTS[-11:], *OUTER]:
        assert flops_per_token(config, L) * B * L == counted(config, B, L)


def test_causal_flops_are_the_pairs_that_see_each_other():
    config, L = BASE, 16
    pairs = sum(1 for query in range(L) for key in range(L) if key <= query)
    full, causal = flops_per_token(config, L) * L, flops_per_token(config, L, causal=True) * L
    a_pair = 3 * 2 * (2 * 24) * config.num_layers
    assert full - causal == (L * L - pairs) * a_pair


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("chunk", [0, 8])
def test_what_is_computed_twice(checkpointing, chunk):
    config = changed(BASE, activation_checkpointing=checkpointing, loss_chunk=chunk)
    price = flops_per_token(config, 16) + flops_recomputed(config, 16)
    if checkpointing == "full":  # the last product of a layer isn't made again: nothing needs it
        price -= config.num_layers * 2 * 24 * 40
    if not chunk:
        assert flops_recomputed(changed(BASE, loss_chunk=0), 16) == 0
    assert price * 32 == counted(config, 2, 16)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # said when oneDNN is switched off
def test_selective_checkpointing_computes_no_kept_product_twice():
    """Counted by torch with flash attention, whose results are kept, and which it doesn't count."""
    for change, again in [
        (dict(), 0),
        (dict(mlp="gelu", num_kv_heads=1, bias=True), 0),
        (dict(mixer="mingru"), 0),
        (dict(mixer="gated_deltanet"), 1),
        (dict(mixer="lstm"), 1),
    ]:
        plain = changed(BASE, loss_chunk=0, **change)
        config = changed(plain, activation_checkpointing="selective")
        x = torch.zeros(2, 16, dtype=torch.long)
        got = []
        for one in (plain, config):
            model = Transformer(one)
            # Products that oneDNN fuses into an LSTM aren't counted.
            plainly = torch.backends.mkldnn.flags(enabled=False)
            with plainly, FlopCounterMode(display=False) as counter:
                objective(model(x, x)).backward()
            got.append(counter.get_total_flops())
        twice = flops_recomputed(config, 16) - flops_recomputed(plain, 16)
        assert got[1] - got[0] == twice * 32
        assert (twice > 0) == bool(again)
