"""Activation bytes against what autograd keeps."""

from contextlib import nullcontext

import pytest
import torch

from forescale.engine.compilation import compile_parts
from forescale.models import Transformer
from forescale.models.heads import loss
from forescale.models.memory import activations
from tests.matrix import FULL
from tests.models import checks
from tests.models.checks import saved_bytes
from tests.models.configs import changed, model_config

SIZES = [
    dict(num_layers=4, width=256, vocab_size=512, max_sequence_length=128),
    dict(num_layers=2, width=128, vocab_size=4096, max_sequence_length=256),
    dict(num_layers=6, width=64, vocab_size=300, max_sequence_length=64, num_heads=4),
]
CHANGES = [
    dict(),
    dict(mixer__qk_norm="none"),
    dict(num_kv_heads=1),
    dict(num_kv_heads=1, head_dim=48, mixer__qkv_bias=True, mixer__gate="channel"),
    dict(mixer_pattern=["latent", "window"], head_dim=32, mixer__window=24),
    dict(mlp="relu2", tie_embeddings=True, position="sinusoidal"),
    dict(mlp="gelu", norm="layernorm", mixer__qk_norm="none", position="learned", bias=True),
    dict(position="alibi", num_kv_heads=1),
    dict(norm__placement="post", mixer__qk_norm="layer"),
    dict(norm__placement="sandwich", mlp="geglu", norm="layernorm"),
    dict(position="relative", num_kv_heads=1),
    dict(norm__placement="residual", norm="layernorm", mixer__qk_norm="none", mlp="relu"),
    dict(norm__embedding=True, head="dense", mlp="gelu_exact", position="learned"),
    dict(mixer__gate="head"),
    dict(mixer__gate="channel", head__softcap=30.0),
    dict(mixer_pattern=["latent", "attention"], position="relative", num_kv_heads=1),
    dict(mixer="latent", position="alibi", mixer__query_rank=48),
    dict(mlp="moe"),
    dict(
        mlp="moe",
        mlp__z_loss=0.0,
        mlp__renormalise=False,
        mlp__expert_width=96,
        mlp__dense_layers=1,
    ),
    dict(
        mlp="moe",
        mlp__scores="sigmoid",
        mlp__experts=16,
        mlp__top_k=4,
        mlp__shared=1,
        mlp__expert_width=64,
    ),
    dict(mlp="moe", mlp__capacity=1.5),
    dict(mixer="window", mixer__window=20, mixer__global_tokens=4, num_kv_heads=1),
    dict(activation_checkpointing="full"),
    *(
        dict(keys, activation_checkpointing="selective")
        for keys in (
            dict(),
            dict(num_kv_heads=1, mixer__qk_norm="none", mlp="gelu", bias=True),
            dict(mixer="mingru", mtp_layers=1),
            dict(mixer="gated_deltanet"),
            dict(mixer="latent", mixer__query_rank=48, norm__placement="post"),
            dict(mixer="lstm"),
            dict(mixer="window", mixer__window=24),
            dict(mlp="moe", mlp__capacity=1.5, mlp__shared=1, mlp__expert_width=64),
            dict(mixer__gate="channel", mixer__value_residual=0.5),
        )
    ),
    dict(mtp_layers=2),
    dict(mtp_layers=1, activation_checkpointing="full", loss_chunk=0),
    dict(mixer__value_residual=0.5),
    dict(mixer__value_residual=0.5, num_kv_heads=1, activation_checkpointing="full"),
    dict(value_embedding=1, bigram_rows=999),
    dict(value_embedding=2, num_kv_heads=1, activation_checkpointing="full"),
    dict(value_embedding=1, mixer__token_shift=True, activation_checkpointing="selective"),
    dict(mixer__token_shift=True, num_kv_heads=1),
    dict(loss_chunk=0),
    dict(loss_chunk=64),
    dict(mlp__chunk=16),
    dict(mlp="gelu", mlp__chunk=16, mtp_layers=1),
    dict(mlp__chunk=512),
    dict(causal=False),
    dict(norm__placement="parallel", norm="layernorm", bias=True, head__bias=True),
    dict(norm__placement="shared", mixer__theta=0.0),
    dict(norm="layernorm", norm__gain=False),
]


# Each change in both types, and with and without documents: in turns, and all with none.
CASES = [
    (change, dtype, documents)
    for i, change in enumerate(CHANGES)
    for dtype in (torch.float32, torch.bfloat16)
    for documents in (False, True)
    if FULL or not change or (i + documents + dtype.itemsize // 2) % 2
]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # said when oneDNN is switched off
@pytest.mark.parametrize(("change", "dtype", "documents"), CASES, ids=str)
def test_activations_are_what_autograd_keeps(change, dtype, documents):
    """On a CPU, where RMSNorm is several kernels."""
    # Each size with some of the changes, and all with none.
    turn = CHANGES.index(change) + documents + dtype.itemsize // 2
    for sizes in [SIZES[turn % len(SIZES)]] if change else SIZES:
        config = model_config(**sizes, **change)
        length, size = config.max_sequence_length, dtype.itemsize
        estimate = activations(config, 2, length, size, documents, fused_norms=False).saved
        assert saved_bytes(config, dtype, documents=documents) == pytest.approx(estimate, rel=0.03)


# Parts that a compiler treats in ways of their own; all else it keeps as a matrix's input.
COMPILED = [
    dict(),
    dict(mixer__qk_norm="none", norm="layernorm", mlp="gelu", bias=True, position="learned"),
    dict(norm__placement="sandwich", mlp="geglu"),
    dict(norm__placement="residual", mlp="relu"),
    dict(mixer="latent", mixer__query_rank=48, mlp="relu2", norm__placement="post"),
    dict(mlp="moe", mixer__gate="channel", num_kv_heads=1, loss_chunk=0),
    dict(mlp="moe", mlp__shared=1, mlp__expert_width=64, mlp__scores="sigmoid"),
    dict(head="dense", mlp="gelu_exact"),
    dict(encoder_layers=2, source_length=64),
    dict(mtp_layers=1, activation_checkpointing="full"),
    dict(activation_checkpointing="selective"),
]


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("change", COMPILED, ids=str)
def test_activations_of_a_compiled_model_are_what_its_graphs_keep(change, monkeypatch):
    """As on a GPU, where the loss keeps the logits of no chunk, and the final norm is compiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(loss, "_saves_memory", lambda x: torch.compiler.is_compiling())
    monkeypatch.setattr(checks, "looked_up", lambda: nullcontext([]))  # the graph keeps these too
    config = model_config(
        num_layers=2, width=256, vocab_size=512, max_sequence_length=128, **change
    )
    model, x = Transformer(config).bfloat16(), torch.zeros(2, 128, dtype=torch.long)
    compile_parts(model, backend := "aot_eager_decomp_partition")  # divides as Inductor
    for name, module in (child for each in (model, *model.mtp) for child in each.named_children()):
        if name.endswith("norm"):
            module.forward = torch.compile(module.forward, backend=backend)
    estimate = activations(config, 2, 128, fused_norms=False, compiled=True).saved
    size = checks.kept_bytes(model, lambda: checks.objective(model(x, x)))
    assert size == pytest.approx(estimate, rel=0.03)


def test_fused_norms_keep_less():
    config = model_config(**SIZES[0])
    fused, several = (activations(config, 2, 128, fused_norms=f) for f in (True, False))
    assert fused.layers < several.layers
    layered = changed(config, norm="layernorm", mixer__qk_norm="none")
    fused, several = (activations(layered, 2, 128, fused_norms=f) for f in (True, False))
    assert fused == several


@pytest.mark.parametrize("num_layers", [1, 4])
def test_the_mask_is_kept_once_for_all_layers(num_layers):
    sizes = dict(width=8, num_heads=1, vocab_size=8, max_sequence_length=256)
    config = model_config(num_layers=num_layers, **sizes)
    model, x = Transformer(config), torch.zeros(2, 256, dtype=torch.long)
    squares = {}

    def pack(tensor):
        if tensor.shape[-2:] == (256, 256):
            squares[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, x, documents_BL=x)
    plain, masked = (activations(config, 2, 256, 4, masked=m).total for m in (False, True))
    assert sum(s.nbytes() for s in squares.values()) == masked - plain


@pytest.mark.parametrize(
    ("vocabulary", "chunk"), [(4096, 8192), (32_000, 4096), (128_256, 1024), (10**6, 512)]
)
def test_a_gpu_takes_more_targets_at_once_but_1_gib_of_logits(vocabulary, chunk):
    config = model_config(depth=2, vocab_size=vocabulary, max_sequence_length=16_384)
    assert config.targets_at_once(on_gpu=True) == chunk
    assert config.targets_at_once(on_gpu=False) == 512
    planned = [
        activations(config, 1, 16_384, fused_norms=on_gpu).logits for on_gpu in (True, False)
    ]
    assert planned == [8 * chunk * vocabulary, 8 * 512 * vocabulary]
    assert planned[0] <= 2**30 or chunk == 512
    args = changed(config, loss_chunk=100)
    assert args.targets_at_once(on_gpu=True) == args.targets_at_once(on_gpu=False) == 100


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # said when oneDNN is switched off
def test_checkpointing_keeps_the_values_of_the_first_layer_for_the_later_ones():
    plain = model_config(**SIZES[0], activation_checkpointing="full")
    mixed = changed(plain, mixer__value_residual=0.5)
    held = [saved_bytes(config, torch.float32) for config in (plain, mixed)]
    counted = [activations(c, 2, 128, 4, fused_norms=False).saved for c in (plain, mixed)]
    assert held[1] - held[0] == counted[1] - counted[0] == 4 * 256 * 2 * 128
