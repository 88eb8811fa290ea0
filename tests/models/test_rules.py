"""One sentence for each combination that cannot be built. Those of sizes: test_model_config.py."""

import math

import pytest

from tests.models.configs import changed, model_config

BASE = model_config(
    num_layers=2, width=64, num_heads=4, num_kv_heads=2, vocab_size=50, max_sequence_length=32
)
BASES = {
    "decoder": BASE,
    "window": changed(BASE, mixer="window"),
    "experts": changed(BASE, mlp="moe", mlp_width=48, mlp__experts=6),
    "latent": changed(BASE, mixer="latent", mixer__rank=24),
    "later": changed(BASE, mtp_layers=2),
    "both": changed(BASE, encoder_layers=3, source_length=11),
}
NTK = dict(position__scaling="ntk", position__scaling__factor=2.0, position__fraction=0.125)
RULES = [
    ("decoder", dict(norm__placement="after"), "norm.placement", "unknown value"),
    ("decoder", dict(position__fraction=0.3), "position.fraction", "even"),
    ("decoder", dict(position__fraction=0.0), "position.fraction", "part of a head"),
    ("decoder", NTK, "num_heads", "ntk"),
    ("decoder", dict(scale_embedding=True, position="sinusoidal"), "scale_embedding", "already"),
    ("decoder", dict(mixer__gate="all"), "mixer.gate", "unknown value"),
    ("decoder", dict(head__softcap=-1.0), "head.softcap", "negative"),
    ("decoder", dict(head__softcap=math.inf), "head.softcap", "number"),
    ("decoder", dict(mixer_pattern=["mingru", "attention"] * 2), "mixer_pattern", "4 mixers for 2"),
    ("decoder", dict(causal=False, mixer="mingru"), "causal", "later"),
    ("decoder", dict(mixer="gated_deltanet", causal=False), "causal", "later"),
    ("decoder", dict(mixer="gated_deltanet", position="alibi"), "position", "alibi"),
    ("decoder", dict(mixer="gated_deltanet", mixer__value_dim=0), "mixer.value_dim", "not a size"),
    ("decoder", dict(mixer="gated_deltanet", mixer__conv=0), "mixer.conv", "not a size"),
    ("decoder", dict(mixer="gated_deltanet", mixer__conv=1000), "mixer.conv", "more than the con"),
    ("decoder", dict(mixer__value_residual=1.0), "mixer.value_residual", "no part"),
    (
        "decoder",
        dict(mixer__value_residual=0.5, num_layers=1),
        "mixer.value_residual",
        "only layer",
    ),
    (
        "decoder",
        dict(mixer__value_residual=0.5, mixer_pattern=["latent", "attention"]),
        "mixer_pattern",
        "the same share",
    ),
    ("decoder", dict(bigram_rows=-1), "bigram_rows", "negative"),
    ("decoder", dict(value_embedding=1, mixer="mingru"), "value_embedding", "no values of att"),
    (
        "decoder",
        dict(value_embedding=2, mixer_pattern=["latent", "attention"]),
        "value_embedding",
        "no values of attention",
    ),
    ("decoder", dict(mtp_weight=0.1), "mtp_weight", "no effect"),
    ("later", dict(value_embedding=1), "value_embedding", "later tokens"),
    ("later", dict(mtp_layers=-1), "mtp_layers", "not a number of modules"),
    ("later", dict(mtp_layers=17), "mtp_layers", "not a number of modules"),
    ("later", dict(mtp_layers=12, max_sequence_length=12), "mtp_layers", "no token is 13 later"),
    ("later", dict(causal=False), "mtp_layers", "causal decoder"),
    ("later", dict(encoder_layers=1), "mtp_layers", "causal decoder"),
    ("later", dict(mixer__value_residual=0.5), "mtp_layers", "values"),
    ("later", dict(mtp_weight=0.0), "mtp_weight", "no part"),
    ("later", dict(mtp_weight=math.nan), "mtp_weight", "no part"),
    ("window", dict(), "mixer.window", "no width"),
    ("window", dict(mixer__window=0), "mixer.window", "no window"),
    ("window", dict(mixer__window=33), "mixer.window", "more than the context's 32"),
    ("window", dict(mixer__window=8, mixer__global_tokens=-1), "mixer.global_tokens", "negative"),
    ("window", dict(mixer__window=8, mixer__global_tokens=99), "mixer.global_tokens", "text's 32"),
    ("window", dict(mixer__window=8, causal=False), "causal", "later ones"),
    ("window", dict(mixer__window=8, position="alibi"), "position", "alibi"),
    ("experts", dict(mlp__top_k=7), "mlp.top_k", "7 of 6"),
    ("experts", dict(mlp__top_k=0), "mlp.top_k", "0 of 6"),
    ("experts", dict(mlp__top_k=1), "mlp.renormalise", "learns nothing"),
    ("experts", dict(mlp__top_k=5), "mlp.expert_width", "5 experts a token do not divide mlp_wid"),
    ("experts", dict(mlp__experts=1), "mlp.experts", "1 is no mixture"),
    ("experts", dict(mlp__expert_width=0), "mlp.expert_width", "0 is not a size"),
    ("experts", dict(mlp__shared=-1), "mlp.shared", "-1 is not a count"),
    ("experts", dict(mlp__dense_layers=2), "mlp.dense_layers", "leave no mixture"),
    ("experts", dict(mlp__scores="tanh"), "mlp.scores", "'tanh'"),
    ("experts", dict(mlp__balance_loss=-0.1), "mlp.balance_loss", "0 or more"),
    ("experts", dict(mlp__capacity=0.5), "mlp.capacity", "without a place"),
    ("experts", dict(mlp__capacity=50.0), "mlp.capacity", "more places than there are tokens"),
    ("experts", dict(mlp__capacity=math.inf), "mlp.capacity", "0 or more"),
    ("experts", dict(mlp__bias_speed=0.001), "mlp.bias_speed", "sigmoid"),
    ("experts", dict(mlp__bias_speed=2.0, mlp__scores="sigmoid"), "mlp.bias_speed", "wider than"),
    ("experts", dict(bias=True), "bias", "no biases"),
    ("latent", dict(position__fraction=1.0), "position.fraction", "latent needs"),
    ("latent", dict(mixer__rank=128), "mixer.rank", "128 does not compress"),
    ("latent", dict(mixer__query_rank=65), "mixer.query_rank", "65 does not compress"),
    ("latent", dict(mixer__rank=64, head_dim=8), "mixer.rank", "keys and values, 64 a token"),
    ("latent", dict(mixer__query_rank=33, head_dim=8), "mixer.query_rank", "queries, 32 a token"),
    ("latent", dict(mixer__query_rank=0), "mixer.query_rank", "0 is not a size"),
    ("both", dict(causal=False), "causal", "no later token"),
    ("both", dict(position="alibi"), "position", "causal models"),
    ("both", dict(mixer="mingru"), "encoder_layers", "mingru"),
    ("both", dict(mixer="lstm"), "encoder_layers", "later"),
    ("both", dict(mixer="window", mixer__window=4), "encoder_layers", "window"),
    ("both", dict(mlp="moe"), "mlp", "no experts"),
    ("both", dict(parametrization="completep"), "parametrization", "one stack"),
    ("both", dict(encoder_layers=-1), "encoder_layers", "-1 is not a number of layers"),
    ("both", dict(encoder_layers=0), "source_length", "no encoder"),
    ("both", dict(source_length=40), "source_length", "none of 32 columns"),
    ("both", dict(bigram_rows=9), "bigram_rows", "alone"),
    ("both", dict(mixer__token_shift=True), "mixer.token_shift", "alone"),
    ("both", dict(mixer__value_residual=0.5), "mixer.value_residual", "in common"),
]


@pytest.mark.parametrize(("base", "change", "field", "text"), RULES, ids=str)
def test_a_broken_rule_names_its_field_and_the_reason(base, change, field, text):
    problems = changed(BASES[base], **change).problems()
    assert [name for name, *_ in problems] == [field]
    assert text in problems[0][1]


def test_what_no_rule_forbids_has_no_problem():
    pattern = dict(mixer_pattern=["window", "attention"], mixer__global_tokens=4)
    for args in (dict(mixer__window=32), pattern | dict(mixer__window=16)):
        assert changed(BASES["window"], **args).problems() == []
    config = changed(BASES["window"], mixer__window=129, max_sequence_length=None)
    assert config.problems(sequence_length=128)
    ((field, *_),) = changed(BASES["both"], max_sequence_length=None).problems(50, 11)
    assert field == "source_length"
