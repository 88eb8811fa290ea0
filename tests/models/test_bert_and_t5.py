"""BERT and T5 of transformers, with the same weights: logits to 1e-5, gradients to 1e-3."""

import contextlib
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.models import ModelConfig, Transformer
from forescale.models.decoding.batch import generate
from forescale.models.decoding.sampler import Sampler
from forescale.models.hf import from_hf, to_hf, two_sided
from forescale.models.hf.pieces import config_of
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


def loaded(name: str, local: Transformer):
    """The class of transformers with our weights, and the names of its parameters by ours."""
    transformers = pytest.importorskip("transformers")
    assert two_sided.architecture(local.config) == name
    keys, weights = two_sided.to_hf(local.config, local.state_dict())
    state, names = dict(weights), [*map(str, local.state_dict())]
    config = transformers.AutoConfig.for_model(**keys, attn_implementation="eager")
    peer = getattr(transformers, name)(config).eval()
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(re.search(r"decoder\.(weight|bias)$|embed_tokens", one) for one in missing)  # tied
    extra = ("bert.embeddings.token_type_embeddings.weight", "lm_head.weight")
    return peer, dict(zip(names, [one for one in state if one not in extra], strict=True))


def compared(local: Transformer, peer, names: dict[str, str], factors: dict[str, float]) -> None:
    """Compare gradients, ours -> theirs; a factor of ours is what our weight was multiplied by."""
    actual = dict(peer.named_parameters())
    for name, p in local.named_parameters():
        assert p.grad is not None, name
        other, by = actual[names[name]].grad, factors.get(name, 1.0)
        torch.testing.assert_close(p.grad * by, other, rtol=1e-3, atol=1e-5)


def test_bert_s_logits_and_gradients():
    """Of the head for masked tokens. Its first segment's vector is a part of our positions."""
    local = scrambled(BERT)
    peer, names = loaded("BertForMaskedLM", local)
    segment = torch.randn(32) * 0.3
    with torch.no_grad():
        peer.bert.embeddings.position_embeddings.weight -= segment
        peer.bert.embeddings.token_type_embeddings.weight += torch.stack([segment, segment * 2])
    x, real = tokens(2, L), torch.ones(2, L, dtype=torch.bool)
    real[1, 14:] = False
    got, expected = local(x, padding_mask_BL=real), peer(x, attention_mask=real.long()).logits
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)
    got[real].square().mean().backward()
    expected[real].square().mean().backward()
    compared(local, peer, names, {})


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


T5_CHANGES = {
    "v1.0": {},
    "v1.1": dict(mlp="geglu", head_dim=12),
    "swiglu": dict(mlp="swiglu", mixer__score_dim=5.0),
}


@pytest.mark.parametrize("change", T5_CHANGES)
def test_t5_s_logits_and_gradients(change):
    """T5 divides no scores, so its queries are smaller."""
    local = scrambled(changed(T5, **T5_CHANGES[change]))
    peer, names = loaded("T5ForConditionalGeneration", local)
    by = {"v1.0": 8, "v1.1": 12, "swiglu": 5}[change] ** 0.5
    factors = {name: by for name in names if name.endswith("query.weight")}
    x, real = tokens(2, S + T), torch.ones(2, S, dtype=torch.long)
    real[1, 15:] = 0
    whole = torch.cat([real.bool(), torch.ones(2, T, dtype=torch.bool)], 1)
    expected = peer(x[:, :S], attention_mask=real, decoder_input_ids=x[:, S:]).logits
    got = local(x, padding_mask_BL=whole)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    got.square().mean().backward()
    expected.square().mean().backward()
    compared(local, peer, names, factors)


def test_t5_writes_the_same():
    """Its most likely tokens, for sources of different lengths, longer than in training."""
    local = scrambled(T5)
    peer, _ = loaded("T5ForConditionalGeneration", local)
    x, real = tokens(3, S + 5), torch.ones(3, S + 5, dtype=torch.long)
    real[1, 15:] = real[2, 4:] = 0
    how = dict(max_new_tokens=25, do_sample=False, eos_token_id=None, decoder_start_token_id=0)
    expected = peer.generate(x, attention_mask=real, **how)
    start = torch.zeros(3, 1, dtype=torch.long)
    how = dict(sampler=Sampler(temperature=0), source_BS=x, source_mask_BS=real)
    assert torch.equal(generate(local, start, 25, **how), expected)
    assert len({tuple(row) for row in expected.tolist()}) == 3
    assert expected.unique().numel() > 4


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SMALL_T5 = dict(d_model=32, d_kv=12, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4)
SMALL_T5 |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=12)
PUBLISHED = {
    "bert": ("BertForPreTraining", SMALL | dict(max_position_embeddings=L)),
    "t5 v1.0": ("T5ForConditionalGeneration", SMALL_T5),
    "t5 v1.1": (
        "T5ForConditionalGeneration",
        SMALL_T5 | dict(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    ),
    "mt5": ("MT5ForConditionalGeneration", SMALL_T5 | dict(feed_forward_proj="gated-gelu")),
}


@pytest.fixture(params=PUBLISHED)
def published(request):
    """A class of transformers with weights of its own, and its config as version 4 writes it."""
    transformers = pytest.importorskip("transformers")
    name, sizes = PUBLISHED[request.param]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    config = cls.config_class(vocab_size=V, attn_implementation="eager", **sizes)
    peer = cls(config).eval()
    keys = config.to_dict()
    if request.param in ("t5 v1.1", "mt5"):  # the head is no embedding
        peer.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 32))
        keys["tie_word_embeddings"] = False
    keys.pop("scale_decoder_outputs", None)
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return request.param, peer, keys


def test_others_come_in_as_ours(published):
    """BERT with what it has for sentences, and the names of 2018; versions 4 and 5 of configs."""
    name, peer, keys = published
    state, x = peer.state_dict(), tokens(2, L)
    if name == "bert":
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        state = {re.sub(r"LayerNorm\.\w+", lambda m: old[m[0]], k): v for k, v in state.items()}
        assert "cls.seq_relationship.weight" in state
        expected = peer(x).prediction_logits
    else:
        expected = peer(x, decoder_input_ids=x[:, :T]).logits
    config, weights = from_hf(keys, state)
    local = Transformer(config).eval()
    local.load_state_dict(weights)
    if name == "bert":
        got = local(x)
    else:
        assert config.tie_embeddings == (name == "t5 v1.0")
        source = torch.zeros(2, config.source_length - L, dtype=torch.long)
        row = torch.cat([source, x, x[:, :T]], 1)
        real = torch.arange(row.shape[1]) >= source.shape[1]
        got = local(row, padding_mask_BL=real.expand(2, -1))
        assert from_hf(peer.config.to_dict(), state)[0] == config  # as version 5 writes it
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()

    back, files = to_hf(config, weights)
    again, same = from_hf(back, dict(files))
    assert changed(again, tie_embeddings=config.tie_embeddings, source_length=None) == changed(
        config, source_length=None
    )
    assert all(torch.equal(same[name], weights[name]) for name in weights)


def test_variants_and_values_of_another_kind_are_refused(published):
    name, _, keys = published
    variants = [{"quantization_config": {}}]
    variants += [{"is_decoder": True}, {"hidden_act": "relu"}] if name == "bert" else []
    for change in variants:
        with pytest.raises(ValueError, match=next(iter(change))):
            config_of(keys | change)
    for key in keys:
        for value in ("2", [1], [[]], {"a": 1}, 3.5, -1, 2**31, 10**400, math.nan, math.inf, True):
            with contextlib.suppress(ValueError):
                assert not config_of(keys | {key: value}).problems(), (key, value)


def test_missing_weights_are_named(published):
    _, peer, keys = published
    state = {k: v for k, v in peer.state_dict().items() if "final_layer_norm" not in k}
    state.pop("bert.embeddings.token_type_embeddings.weight", None)
    with pytest.raises(ValueError, match=r"(final_layer_norm|token_type_embeddings)\S+ is missing"):
        from_hf(keys, state)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["model=bert-base", "objective=masked"], two_sided.BERT),
        (["model=t5-small", "objective=seq2seq"], two_sided.T5),
    ],
)
def test_the_configs_of_both_fit(words, name):
    model = replace(
        compose(TrainJob, words).model, source_length=9 if name == two_sided.T5 else None
    )
    assert two_sided.architecture(model.resolved(30_522, 512)) == name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("count", "longest"), [(32, 128), (8, 12), (64, 1000)])
def test_buckets_are_t5_s(count, longest, causal):
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = torch.arange(-3000, 3000)
    expected = T5Attention._relative_position_bucket(ahead, not causal, count, longest)
    assert torch.equal(buckets(ahead, count, longest, causal), expected)
