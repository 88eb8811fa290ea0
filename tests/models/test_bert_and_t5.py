"""BERT and T5 of transformers, with the same weights: logits to 1e-5, gradients to 1e-3."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from forescale.models import ModelConfig, Transformer
from forescale.models.decoding.batch import generate
from forescale.models.decoding.sampler import Sampler
from forescale.models.positions.biases import buckets
from tests.models.configs import changed, model_config

L, S, T, V = 20, 23, 9, 37
BERT = model_config(
    num_layers=2, width=32, num_heads=4, mlp_width=48, vocab_size=V, max_sequence_length=L,
    causal=False, position="learned", norm="layernorm", norm__placement="residual", norm__eps=1e-12,
    norm__embedding=True, mlp="gelu_exact", head="dense", bias=True, mixer__qk_norm="none",
    tie_embeddings=True, init_std=0.3, loss_chunk=0,
)  # fmt: skip
T5 = model_config(
    num_layers=2, encoder_layers=3, width=32, num_heads=4, mlp_width=48, vocab_size=V,
    max_sequence_length=S + T, source_length=S, position="relative", position__buckets=8,
    position__distance=12, mlp="relu", mixer__qk_norm="none", tie_embeddings=True, init_std=0.3,
    loss_chunk=0,
)  # fmt: skip


def scrambled(config: ModelConfig) -> Transformer:
    """No weight at a special value, so that a swapped one shows."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def tokens(rows: int, length: int) -> Tensor:
    """Without 0, their padding, whose embedding gets no gradient."""
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(3))


def compared(local: Transformer, peer, names: dict[str, str], factors: dict[str, float]) -> None:
    """Compare gradients, ours -> theirs; a factor of ours is what our weight was multiplied by."""
    actual = dict(peer.named_parameters())
    for name, p in local.named_parameters():
        assert p.grad is not None, name
        other, by = actual[names[name]].grad, factors.get(name, 1.0)
        torch.testing.assert_close(p.grad * by, other, rtol=1e-3, atol=1e-5)


BERT_OUTER = {
    "embedding.weight": "bert.embeddings.word_embeddings.weight",
    "embedding.bias": "cls.predictions.bias",
    "position.weight": "bert.embeddings.position_embeddings.weight",
}
BERT_MODULES = {
    "embedding_norm": "bert.embeddings.LayerNorm",
    "transform.dense": "cls.predictions.transform.dense",
    "transform.norm": "cls.predictions.transform.LayerNorm",
    "mixer.query": "attention.self.query",
    "mixer.key": "attention.self.key",
    "mixer.value": "attention.self.value",
    "mixer.output": "attention.output.dense",
    "mixer_post_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_post_norm": "output.LayerNorm",
}


def in_bert(name: str) -> str:
    """Our parameter's name -> theirs."""
    if name in BERT_OUTER:
        return BERT_OUTER[name]
    module, leaf = name.rsplit(".", 1)
    if not module.startswith("blocks."):
        return f"{BERT_MODULES[module]}.{leaf}"
    _, layer, inner = module.split(".", 2)
    return f"bert.encoder.layer.{layer}.{BERT_MODULES[inner]}.{leaf}"


def test_bert_s_logits_and_gradients():
    """Of the head for masked tokens. Its first segment's vector is a part of our positions."""
    transformers = pytest.importorskip("transformers")
    local = scrambled(BERT)
    peer = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, hidden_act="gelu", max_position_embeddings=L,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-12,
            pad_token_id=0, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    segment = torch.randn(32) * 0.3
    state = {in_bert(name): p.clone() for name, p in local.state_dict().items()}
    state["bert.embeddings.position_embeddings.weight"] -= segment
    state["bert.embeddings.token_type_embeddings.weight"] = torch.stack([segment, segment * 2])
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("cls.predictions.decoder.") for name in missing)  # tied
    x, real = tokens(2, L), torch.ones(2, L, dtype=torch.bool)
    real[1, 14:] = False
    got, expected = local(x, padding_mask_BL=real), peer(x, attention_mask=real.long()).logits
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)
    got[real].square().mean().backward()
    expected[real].square().mean().backward()
    compared(local, peer, {name: in_bert(name) for name, _ in local.named_parameters()}, {})


@pytest.mark.parametrize("chunk", [0, 7])
def test_the_loss_is_that_of_the_logits_with_their_bias(chunk):
    local, x = scrambled(changed(BERT, loss_chunk=chunk, z_loss=0.1)), tokens(2, L)
    targets = x.roll(1, 1).masked_fill(x < 9, -100)
    logits = local(x)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    penalty = 0.1 * (logits.logsumexp(-1).square() * (targets != -100)).sum()
    losses, actual = local(x, targets)
    torch.testing.assert_close(losses.sum(), expected)
    torch.testing.assert_close(actual, penalty)
    parameters = list(local.parameters())
    target = torch.autograd.grad(expected + penalty, parameters)
    for a, b in zip(torch.autograd.grad(losses.sum() + actual, parameters), target, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


T5_INNER = {"query": "q", "key": "k", "value": "v", "output": "o", "up": "wi", "down": "wo"}
T5_PLACES = {"mixer": (0, "SelfAttention"), "cross": (1, "EncDecAttention")}


def in_t5(name: str) -> str:
    """Our parameter's name -> theirs."""
    table = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    outer = {
        "embedding.weight": "shared.weight",
        "encoder_relative_position.weight": f"encoder.{table}",
        "relative_position.weight": f"decoder.{table}",
        "norm.weight": "decoder.final_layer_norm.weight",
        f"blocks.{T5.encoder_layers - 1}.output_norm.weight": "encoder.final_layer_norm.weight",
    }
    if name in outer:
        return outer[name]
    _, index, inner = name.split(".", 2)
    layer, half = int(index), "encoder"
    if layer >= T5.encoder_layers:
        layer, half = layer - T5.encoder_layers, "decoder"
    part, leaf = inner.split(".", 1)
    last = 1 if half == "encoder" else 2
    place, module = T5_PLACES.get(part.removesuffix("_norm"), (last, "DenseReluDense"))
    at = f"{half}.block.{layer}.layer.{place}"
    if part.endswith("_norm"):
        return f"{at}.layer_norm.weight"
    return f"{at}.{module}.{T5_INNER[leaf.removesuffix('.weight')]}.weight"


def in_transformers(local: Transformer):
    """T5 with our weights, the names of its parameters by ours, and the factors of `compared`.

    It divides no scores by the root of a head's width, and logits by the root of the width: our
    queries and our last norm take these factors.
    """
    transformers = pytest.importorskip("transformers")
    peer = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2,
            num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=12,
            dropout_rate=0.0, feed_forward_proj="relu", tie_word_embeddings=True, pad_token_id=0,
            decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip
    names = {name: in_t5(name) for name, _ in local.named_parameters()}
    factors = {name: 8**0.5 for name in names if name.endswith("query.weight")}
    factors["norm.weight"] = 32**-0.5
    state = {names[name]: p / factors.get(name, 1.0) for name, p in local.state_dict().items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert set(missing) <= tied
    return peer, names, factors


def test_t5_s_logits_and_gradients():
    local = scrambled(T5)
    peer, names, factors = in_transformers(local)
    x, real = tokens(2, S + T), torch.ones(2, S, dtype=torch.long)
    real[1, 15:] = 0
    whole = torch.cat([real.bool(), torch.ones(2, T, dtype=torch.bool)], 1)
    expected = peer(x[:, :S], attention_mask=real, decoder_input_ids=x[:, S:]).logits
    got = local(x, padding_mask_BL=whole)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.square().mean().backward()
    expected.square().mean().backward()
    compared(local, peer, names, factors)


def test_t5_writes_the_same():
    """Its most likely tokens, for sources of different lengths, longer than in training."""
    local = scrambled(T5)
    peer, *_ = in_transformers(local)
    x, real = tokens(3, S + 5), torch.ones(3, S + 5, dtype=torch.long)
    real[1, 15:] = real[2, 4:] = 0
    how = dict(max_new_tokens=25, do_sample=False, eos_token_id=None)
    expected = peer.generate(x, attention_mask=real, **how)
    start = torch.zeros(3, 1, dtype=torch.long)
    how = dict(sampler=Sampler(temperature=0), source_BS=x, source_mask_BS=real)
    assert torch.equal(generate(local, start, 25, **how), expected)
    assert len({tuple(row) for row in expected.tolist()}) == 3
    assert expected.unique().numel() > 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("count", "longest"), [(32, 128), (8, 12), (64, 1000)])
def test_buckets_are_t5_s(count, longest, causal):
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = torch.arange(-3000, 3000)
    expected = T5Attention._relative_position_bucket(ahead, not causal, count, longest)
    assert torch.equal(buckets(ahead, count, longest, causal), expected)
