"""A model that is prepared for decoding computes the same as before, in another layout."""

import pytest
import torch

from forescale.models import Transformer
from forescale.models.decoding.batch import generate
from forescale.models.decoding.products import Int8Product, PackedProduct, has_int8, prepare
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


needs_int8 = pytest.mark.skipif(not has_int8(), reason="needs a torch with oneDNN's 8 bits")


@needs_int8
@torch.no_grad()
def test_a_product_of_8_bits_is_as_near_as_its_roundings_and_of_each_row_alone():
    torch.manual_seed(0)
    weight, x = torch.randn(512, 768), torch.randn(5, 768) * torch.logspace(-3, 3, 5)[:, None]
    x[3, 7], x[4] = 100 * x[3, 7], 0.0
    product = Int8Product(weight)
    y = product(x, weight)
    units_x = x.abs().amax(1, keepdim=True) / 127
    units_w = weight.abs().amax(1) / 127
    bound = x.abs().sum(1, keepdim=True) * units_w / 2
    bound += weight.abs().sum(1) * units_x / 2 + 768 * units_x * units_w / 4
    assert ((y - x @ weight.T).abs() <= bound * 1.001).all()
    assert all(torch.equal(product(row[None], weight)[0], y[i]) for i, row in enumerate(x))


@needs_int8
@torch.no_grad()
def test_a_model_of_8_bits_has_nearly_the_same_logits():
    torch.manual_seed(0)
    sizes = SIZES | dict(width=512, vocab_size=600)
    model, tokens = Transformer(model_config(**sizes)).eval(), torch.randint(0, 600, (3, 6))
    expected = model(tokens)
    prepare(model, int8=True)
    assert type(model.blocks[0].mixer.query.product) is Int8Product
    difference = model(tokens) - expected
    assert 0 < difference.std() < 0.05 * expected.std()
