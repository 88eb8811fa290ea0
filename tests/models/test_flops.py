"""Parameters against the model itself, FLOPs against torch's own counter, to the last one."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from forescale.models import ModelConfig, Transformer
from forescale.models.costs import MLPS
from forescale.models.flops import (
    activation_bytes,
    activations,
    count,
    flops_6n,
    flops_per_token,
    flops_recomputed,
    matrices,
    shapes,
)
from forescale.models.parametrization import factors
from forescale.models.rules import NORMS, POSITIONS
from tests.models.checks import kept_bytes

BASE = ModelConfig(
    num_layers=2, width=24, num_heads=3, mlp_width=40, vocab_size=70, max_sequence_length=16
)
VARIANTS = [
    replace(BASE, position=p, norm=n, mlp=m, bias=b, qk_norm=q, num_kv_heads=g, tie_embeddings=t)
    for p, n, m, b, q, g, t in product(
        POSITIONS, NORMS, MLPS, (False, True), (False, True), (None, 1), (False, True)
    )
    if not (m == "moe" and b)  # experts have no biases
]

VARIANTS += [
    replace(BASE, norm_placement="post", qk_norm_over="layer", num_kv_heads=1),
    replace(BASE, norm_placement="sandwich", mlp="geglu", scale_embedding=True, bias=True),
    replace(BASE, attention_gate="head", logit_softcap=30.0, rope_fraction=0.5),
    replace(BASE, attention_gate="channel", bias=True),
]
# Those whose outer parts differ from the others'.
OUTER = [
    replace(BASE, norm="layernorm", bias=True, head="dense", embedding_norm=True, **more)
    for more in (
        dict(norm_placement="residual", tie_embeddings=True, causal=False, position="learned"),
        dict(parametrization="mup", position="relative"),
    )
]


def test_parameters_of_every_variant():
    for config in VARIANTS:
        model, counts = Transformer(config), count(config)
        sizes = {name: p.numel() for name, p in model.named_parameters()}

        def under(prefix, sizes=sizes):
            return sum(n for name, n in sizes.items() if name.startswith(prefix))

        assert counts.total == sum(sizes.values())
        assert counts.embedding == under("embedding.")
        assert counts.position == under("position.") + under("relative_position.")
        assert counts.blocks == under("blocks.")
        assert counts.non_embedding == under("blocks.") + under("norm.")
        assert counts.head == (under("embedding.") if config.tie_embeddings else under("head."))
        idle = counts.total - counts.active
        assert (idle > 0) == (config.mlp == "moe")
        assert flops_6n(config) == 6 * (counts.blocks + counts.head - idle)


def test_shapes_are_those_of_the_model_in_its_order():
    for config in VARIANTS + OUTER:
        model = Transformer(config)
        assert count(config).total == sum(p.numel() for p in model.parameters())
        if config.parametrization != "standard":
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


def objective(output):
    """The sum of losses, and of a penalty if there is one."""
    losses, penalty = output if isinstance(output, tuple) else (output, 0.0)
    return losses.sum() + penalty


def test_flops_of_every_choice_exactly():
    """Every thirteenth variant: that meets every pair of choices."""
    B, L = 2, 16
    for config in [*VARIANTS[:-4:13], *VARIANTS[-4:], *OUTER]:
        assert flops_per_token(config, L) * B * L == counted(config, B, L)


def test_chunks_of_the_loss_make_the_logits_again():
    """The one recomputation that a normal step has: the head's forward, a third of its cost."""
    chunked = replace(BASE, loss_chunk=8)
    again = 2 * 24 * 70
    assert (flops_per_token(BASE, 16) + again) * 32 == counted(chunked, 2, 16)


def test_causal_flops_are_the_pairs_that_see_each_other():
    config, L = BASE, 16
    pairs = sum(1 for query in range(L) for key in range(L) if key <= query)
    full, causal = flops_per_token(config, L) * L, flops_per_token(config, L, causal=True) * L
    a_pair = 3 * 2 * (2 * 24) * config.num_layers
    assert full - causal == (L * L - pairs) * a_pair


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [0, 8])
def test_what_is_computed_twice(checkpointing, chunk):
    config = replace(BASE, activation_checkpointing=checkpointing, loss_chunk=chunk)
    price = flops_per_token(config, 16) + flops_recomputed(config, 16)
    if checkpointing:  # the last product of a layer isn't made again: nothing needs it
        price -= config.num_layers * 2 * 24 * 40
    if not chunk:
        assert flops_recomputed(replace(BASE, loss_chunk=0), 16) == 0
    assert price * 32 == counted(config, 2, 16)


def saved(config, dtype, B=2, documents=False):
    """Bytes that autograd keeps after a forward pass, beside the weights."""
    L = config.max_sequence_length
    model, x = Transformer(config).to(dtype), torch.zeros(B, L, dtype=torch.long)
    # oneDNN's LSTM keeps a workspace of its own.
    with torch.backends.mkldnn.flags(enabled=config.mixer != "lstm"):
        return kept_bytes(
            model, lambda: objective(model(x, x, documents_BL=x if documents else None))
        )


SIZES = [
    dict(num_layers=4, width=256, vocab_size=512, max_sequence_length=128),
    dict(num_layers=2, width=128, vocab_size=4096, max_sequence_length=256),
    dict(num_layers=6, width=64, vocab_size=300, max_sequence_length=64, num_heads=4),
]
CHANGES = [
    dict(),
    dict(qk_norm=False),
    dict(num_kv_heads=1),
    dict(mlp="relu2", tie_embeddings=True, position="sinusoidal"),
    dict(mlp="gelu", norm="layernorm", qk_norm=False, position="learned", bias=True),
    dict(position="alibi", num_kv_heads=1),
    dict(mixer="mingru"),
    dict(mixer="lstm"),
    dict(norm_placement="post", qk_norm_over="layer"),
    dict(norm_placement="sandwich", mlp="geglu", norm="layernorm"),
    dict(position="relative", num_kv_heads=1),
    dict(norm_placement="residual", norm="layernorm", qk_norm=False, mlp="relu"),
    dict(embedding_norm=True, head="dense", mlp="gelu_exact", position="learned"),
    dict(attention_gate="head"),
    dict(attention_gate="channel", logit_softcap=30.0),
    dict(mixer="gated_deltanet"),
    dict(mixer="latent"),
    dict(mixer="latent", position="relative"),
    dict(mixer="latent", position="alibi", latent_query_rank=48),
    dict(mlp="moe"),
    dict(mlp="moe", moe_z_loss=0.0, moe_renormalise=False, moe_width=96, moe_dense_layers=1),
    dict(mlp="moe", moe_scores="sigmoid", moe_experts=16, moe_top_k=4, moe_shared=1, moe_width=64),
    dict(mlp="moe", moe_capacity=1.5),
    dict(mixer="window", window=24),
    dict(mixer="window", window=20, global_tokens=4, num_kv_heads=1),
    dict(mixer="block_sparse", sparse_block=8),
    dict(mixer="block_sparse", sparse_block=16, sparse_local=2, sparse_pattern="bigbird"),
    dict(activation_checkpointing=True),
    dict(loss_chunk=0),
    dict(loss_chunk=64),
]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # said when oneDNN is switched off
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_activations_are_what_autograd_keeps(change, dtype, documents):
    """On a CPU, where RMSNorm is several kernels."""
    # Each size with some of the changes, and all with none.
    turn = CHANGES.index(change) + documents + dtype.itemsize // 2
    for sizes in [SIZES[turn % len(SIZES)]] if change else SIZES:
        config = ModelConfig(**sizes, **change)
        length, size = config.max_sequence_length, dtype.itemsize
        estimate = activations(config, 2, length, size, documents, fused_norms=False).saved
        assert saved(config, dtype, documents=documents) == pytest.approx(estimate, rel=0.03)


def test_fused_norms_keep_less():
    config = ModelConfig(**SIZES[0])
    fused, several = (activations(config, 2, 128, fused_norms=f) for f in (True, False))
    assert fused.layers < several.layers
    layered = replace(config, norm="layernorm", qk_norm=False)
    fused, several = (activations(layered, 2, 128, fused_norms=f) for f in (True, False))
    assert fused == several


@pytest.mark.parametrize("num_layers", [1, 4])
def test_the_mask_is_kept_once_for_all_layers(num_layers):
    sizes = dict(width=8, num_heads=1, vocab_size=8, max_sequence_length=256)
    config = ModelConfig(num_layers=num_layers, **sizes)
    model, x = Transformer(config), torch.zeros(2, 256, dtype=torch.long)
    squares = {}

    def pack(tensor):
        if tensor.shape[-2:] == (256, 256):
            squares[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, x, documents_BL=x)
    plain, masked = (activation_bytes(config, 2, 256, 4, masked=m) for m in (False, True))
    assert sum(s.nbytes() for s in squares.values()) == masked - plain


def test_activation_checkpointing_keeps_one_layer_and_the_inputs():
    config = ModelConfig(depth=12, vocab_size=8, max_sequence_length=128, loss_chunk=1)
    whole = activation_bytes(config, 1, 128)
    kept = activation_bytes(replace(config, activation_checkpointing=True), 1, 128)
    inputs = 12 * 128 * 768 * 2
    assert kept - inputs < whole / 8
