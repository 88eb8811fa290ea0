"""An encoder-decoder: who sees whom, its counts, and Pegasus of transformers as an oracle."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from forescale.models import Transformer
from forescale.models.flops import (
    count,
    flops_per_row,
    flops_per_token,
    flops_recomputed,
    matrices,
    shapes,
)
from forescale.models.hf import family_of
from forescale.models.memory import activations, cache_bytes
from forescale.models.parametrization import factors
from tests.models.checks import assert_one_graph, kept_bytes
from tests.models.configs import changed, model_config

S, T, V = 11, 7, 37
SMALL = model_config(
    num_layers=2, encoder_layers=3, width=32, num_heads=4, num_kv_heads=2, mlp_width=24,
    vocab_size=V, max_sequence_length=S + T, source_length=S, init_std=0.3, loss_chunk=0,
)  # fmt: skip
LEARNED = changed(
    SMALL, position="learned", norm="layernorm", mlp="gelu", bias=True, mixer__qk_norm="none",
    num_kv_heads=4, norm__eps=1e-5, mlp_width=48, tie_embeddings=True,
)  # fmt: skip
CONFIGS = {
    "rotary": SMALL,
    "learned": LEARNED,
    "sinusoidal": changed(SMALL, position="sinusoidal", num_layers=3, encoder_layers=1),
    "relative": changed(SMALL, position="relative", head="dense"),
    "sandwich": changed(SMALL, norm__placement="sandwich", position="none"),
    "post": changed(SMALL, norm__placement="post", mixer__gate="head"),
    "residual": changed(SMALL, norm__placement="residual"),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
DECODED = CONFIGS | {
    "latent": changed(SMALL, mixer="latent", num_kv_heads=None),
    "relative": changed(SMALL, position="relative", mixer__qk_norm="none"),
}
decoding = pytest.mark.parametrize("config", DECODED.values(), ids=DECODED)


def build(config, **keys):
    torch.manual_seed(0)
    return Transformer(changed(config, **keys)).eval()


def tokens(rows):
    return torch.randint(0, V, (rows, S + T), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@each
def test_the_decoder_sees_the_whole_source_and_no_later_target(config):
    model, x = build(config), tokens(1)
    changed = x.repeat(S + T, 1)
    changed[torch.arange(S + T), torch.arange(S + T)] = (x[0] + 1) % V  # row t differs at t
    difference = (model(changed) - model(x)).abs().amax(-1)
    assert difference.shape == (S + T, T)
    assert (difference[:S] > 1e-4).all(), "every output depends on every token of the source"
    visible = torch.ones(T, T, dtype=torch.bool).triu()  # input t changes output t and later ones
    assert (difference[S:][visible] > 1e-4).all()
    assert (difference[S:][~visible] < 1e-5).all()


@torch.no_grad()
@each
def test_padding_before_the_source_and_after_the_target_changes_nothing(config):
    """A row of fewer tokens in the columns of a longer one."""
    model, x = build(config), tokens(2)
    short = build(config, source_length=S - 4)
    if model.position is not None:
        short.load_state_dict(model.state_dict())
    real = torch.ones(2, S + T, dtype=torch.bool)
    real[0, :4] = real[0, S + T - 2 :] = False
    got = model(x, padding_mask_BL=real)
    alone = short(x[:1, 4 : S + T - 2])
    torch.testing.assert_close(got[:1, : T - 2], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1:], model(x[1:]), rtol=1e-4, atol=1e-5)
    assert (model(x)[:1, : T - 2] - alone).abs().max() > 1e-3, "without a mask it would be seen"


@torch.no_grad()
@decoding
@pytest.mark.parametrize("pieces", [[T], [1] * T, [3, 1, 3]])
def test_reading_the_target_in_pieces_with_a_cache_equals_reading_the_row(config, pieces):
    """Of rows whose sources have different lengths; what the first piece has read is kept."""
    model, x = build(config), tokens(3)
    real = torch.ones(3, S + T, dtype=torch.bool)
    real[1, :4] = real[2, :1] = False
    whole, actual = model(x, padding_mask_BL=real), []
    cache = model.encode(x[:, :S], real[:, :S])
    for piece in x[:, S:].split(pieces, 1):
        actual.append(model(piece, cache=cache))
        cache.source.fill_(torch.nan)
    torch.testing.assert_close(torch.cat(actual, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@decoding
def test_the_cache_takes_the_bytes_that_are_planned(config):
    model, x = build(config), tokens(1)
    cache = model.encode(x[:, :S])
    model(x[:, S:], cache=cache)
    assert cache.num_bytes == cache_bytes(config, S + T, 4)


def test_a_row_of_padding_gives_no_nan():
    model, x = build(SMALL), tokens(2)
    targets = x.clone()
    targets[:, :S] = targets[0] = -100
    real = torch.ones(2, S + T, dtype=torch.bool)
    real[0] = False
    losses = model(x, targets, padding_mask_BL=real)
    losses.sum().backward()
    assert losses[0] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())
    expected = build(SMALL)(x[1:], targets[1:])
    torch.testing.assert_close(losses[1:], expected)


@each
@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_it_is_counted_as_it_is(config, chunk, checkpointing):
    config = changed(config, loss_chunk=chunk, activation_checkpointing=checkpointing)
    model, x = build(config), tokens(2)
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(shapes(config).items()) == list(named.items())
    assert count(config).total == sum(p.numel() for p in model.parameters())
    assert matrices(config) == model.muon_parameters()
    row = flops_per_row(config, S + T)
    assert flops_per_token(config, S + T) == row / (S + T)
    assert flops_per_row(config, S + T, causal=True) < row
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, x).sum().backward()
    again = flops_recomputed(config, S + T) * (S + T)
    if checkpointing == "full" and config.norm.placement == "pre":
        # The last product of a layer isn't made again unless a norm needs it.
        columns = (config.encoder_layers - 1) * S + config.num_layers * T
        again -= 2 * config.mlp_width * config.width * columns
    assert counter.get_total_flops() == pytest.approx(2 * (row + again), abs=1e-3)


def saved(config, masked):
    """Bytes of all storages that autograd keeps after a forward, beside the weights."""
    L = config.max_sequence_length
    model, x = Transformer(config), torch.zeros(2, L, dtype=torch.long)
    real = torch.ones(2, L, dtype=torch.bool)
    real[0, :9] = False
    return kept_bytes(model, lambda: model(x, x, padding_mask_BL=real if masked else None).sum())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "change", [{}, dict(mixer__qk_norm="none", num_kv_heads=1), dict(loss_chunk=0)]
)
def test_activations_are_what_autograd_keeps(change, masked):
    config = model_config(
        num_layers=2, encoder_layers=3, width=128, vocab_size=2048, source_length=200,
        max_sequence_length=256, **change,
    )  # fmt: skip
    estimate = activations(config, 2, 256, 4, masked, fused_norms=False).saved
    assert saved(config, masked) == pytest.approx(estimate, rel=0.03)


@pytest.mark.slow  # seconds each
def test_it_compiles_as_one_graph():
    model, x = build(SMALL).train(), tokens(2)
    assert_one_graph(model, lambda of: of(x, x).sum())


PEGASUS = {
    "mixer_norm": "self_attn_layer_norm",
    "mixer": "self_attn",
    "cross_norm": "encoder_attn_layer_norm",
    "cross": "encoder_attn",
    "mlp_norm": "final_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}


def in_pegasus(name, encoder_layers):
    """Our parameter's name -> those of Pegasus: its halves share the embedding, and here also the
    positions."""
    module, leaf = name.rsplit(".", 1)
    if module == "embedding":
        return [f"{part}.{leaf}" for part in ("shared", "encoder.embed_tokens")]
    if module == "position":
        return [f"{part}.embed_positions.{leaf}" for part in ("encoder", "decoder")]
    if module == "norm":
        return [f"decoder.layer_norm.{leaf}"]
    _, index, inner = module.split(".", 2)
    layer = int(index)
    if inner == "output_norm":
        return [f"encoder.layer_norm.{leaf}"]
    half = "encoder" if layer < encoder_layers else "decoder"
    at = f"{half}.layers.{layer if half == 'encoder' else layer - encoder_layers}"
    if inner in PEGASUS:
        return [f"{at}.{PEGASUS[inner]}.{leaf}"]
    part, projection = inner.split(".")
    return [f"{at}.{PEGASUS[part]}.{PROJECTIONS[projection]}.{leaf}"]


def test_logits_and_gradients_equal_pegasus():
    """Pre-norm with final norms, as ours; its sinusoids are a table, which takes our positions."""
    transformers = pytest.importorskip("transformers")
    local = build(LEARNED)
    with torch.no_grad():  # no weight at a special value, so that a swapped one shows
        for p in local.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    c = local.config
    peer = transformers.PegasusForConditionalGeneration(
        transformers.PegasusConfig(
            vocab_size=V,
            d_model=c.width,
            encoder_layers=3,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=S + T,
            activation_function="gelu_new",
            scale_embedding=False,
            dropout=0.0,
            attn_implementation="eager",
            pad_token_id=0,
        )
    ).eval()
    state = {there: p for name, p in local.state_dict().items() for there in in_pegasus(name, 3)}
    missing, unexpected = peer.model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"decoder.embed_tokens.weight"}  # tied
    x = tokens(2).clamp(min=1)  # 0 is their padding, whose embedding gets no gradient
    real = torch.ones(2, S, dtype=torch.long)
    real[1, 8:] = 0  # on the right: its positions count padding
    whole = torch.cat([real.bool(), torch.ones(2, T, dtype=torch.bool)], 1)
    expected = peer(x[:, :S], attention_mask=real, decoder_input_ids=x[:, S:]).logits
    got = local(x, padding_mask_BL=whole)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    actual = dict(peer.model.named_parameters())
    for name, p in local.named_parameters():
        if name == "position.weight":  # a buffer of theirs
            continue
        torch.testing.assert_close(
            p.grad, actual[in_pegasus(name, 3)[0]].grad, rtol=1e-3, atol=1e-3
        )


def test_muon_and_mup_know_all_of_its_matrices():
    config = changed(SMALL, parametrization="mup", parametrization__base_width=16)
    actual = factors(config)
    assert set(actual) == set(shapes(config))
    assert actual["blocks.3.cross.query.weight"].of == "hidden"
    with pytest.raises(ValueError, match=r"encoder_layers=0 \(not 3\)"):
        family_of(LEARNED.resolved())
    model, x = Transformer(SMALL), tokens(1)
    with pytest.raises(ValueError, match="no source for the decoder; make it by encode"):
        model(x, cache=model.new_cache())


def test_each_stack_starts_by_its_own_depth():
    """Matrices that write to the stream: 2 in a layer of the encoder, 3 in one of the decoder."""
    torch.manual_seed(0)
    deep = changed(SMALL, encoder_layers=8, num_layers=2, width=256, init_std=None)
    model = Transformer(deep)
    spread = [model.blocks[i].mixer.output.weight.std().item() for i in (0, 8)]
    assert spread[0] / spread[1] == pytest.approx((2 * 8 / (3 * 2)) ** -0.5, rel=0.02)
