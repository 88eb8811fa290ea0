"""A model that is prepared for decoding computes the same as before, in another layout."""

import pytest
import torch

from forescale.models import Transformer
from forescale.models.decoding.batch import generate
from forescale.models.decoding.products import PackedProduct, prepare
from forescale.models.decoding.sampler import Sampler
from forescale.models.init import Linear
from tests.models.configs import model_config

SIZES = dict(num_layers=1, width=256, num_heads=4, vocab_size=300, max_sequence_length=32)
KINDS = {
    "grouped-query": dict(num_kv_heads=2, mlp="swiglu"),
    "tied, with biases": dict(tie_embeddings=True, bias=True, mlp="gelu", norm="layernorm"),
    "latent": dict(mixer_pattern=["latent"]),
    "experts": dict(mlp="moe", mlp__experts=4, mlp__shared=1, mlp__expert_width=64),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_plain_model(kind):
    torch.manual_seed(0)
    model = Transformer(model_config(**SIZES | kind)).eval()
    tokens = torch.randint(0, 300, (3, 6))
    whole, one = model(tokens), model(tokens[:1, :1])
    stored = generate(model, tokens, 4, sampler=Sampler(temperature=0))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    assert prepare(model) is model
    assert type(model.blocks[0].mixer.query.product) is PackedProduct
    for got, want in ((model(tokens), whole), (model(tokens[:1, :1]), one)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    assert torch.equal(generate(model, tokens, 4, sampler=Sampler(temperature=0)), stored)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_small_matrices_and_other_formats_stay_as_they_are():
    small, half = Linear(64, 128, False, 1.0), Linear(256, 512, False, 1.0).bfloat16()
    assert small.weight.shape == (128, 64)
    prepare(torch.nn.ModuleList([small, half]))
    for one in (small, half):
        assert one.product is None
        assert one.weight.is_contiguous()


def test_a_large_matrix_is_laid_out_by_columns_if_it_has_more_rows():
    tall, wide = Linear(256, 512, False, 1.0), Linear(512, 256, False, 1.0)
    prepare(torch.nn.ModuleList([tall, wide]))
    assert [one.weight.t().is_contiguous() for one in (tall, wide)] == [True, False]
