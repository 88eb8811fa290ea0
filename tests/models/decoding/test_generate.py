"""What an encoder-decoder writes, token by token, to sources of different lengths."""

import pytest
import torch

from forescale.models import ModelConfig, Transformer
from forescale.models.decoding.batch import generate
from forescale.models.decoding.sampler import Sampler

S, T, V = 9, 12, 37
SMALL = ModelConfig(
    num_layers=2, encoder_layers=2, width=32, num_heads=4, mlp_width=24, vocab_size=V,
    max_sequence_length=S + T, source_length=S, init_std=0.3, dropout=0.5,
)  # fmt: skip
LIKELIEST = Sampler(temperature=0)
START = torch.zeros(2, 1, dtype=torch.long)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(SMALL).train()


def source(rows=2):
    return torch.randint(1, V, (rows, S), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_it_writes_what_whole_rows_say_is_most_likely(model):
    x = source()
    got = generate(model, START, T - 1, sampler=LIKELIEST, source_BS=x)
    assert model.training  # as it came
    rows, model = torch.cat([x, START], 1), model.eval()
    for _ in range(T - 1):
        rows = torch.cat([rows, model(rows)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, rows[:, S:])
    assert got.unique().numel() > 4


def test_a_batch_with_padding_is_written_as_each_row_alone(model):
    x = source()
    real = torch.ones(2, S, dtype=torch.bool)
    real[1, :4] = False
    got = generate(model, START, 10, sampler=LIKELIEST, source_BS=x, source_mask_BS=real)
    alone = generate(model, START[:1], 10, sampler=LIKELIEST, source_BS=x[1:, 4:])
    assert torch.equal(got[1:], alone)
    labels = generate(model, START[:1], 10, sampler=LIKELIEST, source_BS=x[1:])
    assert not torch.equal(labels, alone), "without a mask it would be seen"


def test_it_samples_by_its_generator(model):
    def sample(seed):
        drawn = torch.Generator().manual_seed(seed)
        return generate(
            model, START, 10, generator=drawn, sampler=Sampler(top_k=5), source_BS=source()
        )

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_a_target_ends_where_the_decoder_may_read_no_more(model):
    got = generate(model, START, 30, sampler=LIKELIEST, max_context=6, source_BS=source())
    assert got.shape[1] == 1 + 6


def test_a_source_is_for_encoder_decoders_and_they_need_one(model):
    with pytest.raises(ValueError, match="make it by encode"):
        generate(model, START, 1)
    decoder = Transformer(ModelConfig(depth=1, vocab_size=V, max_sequence_length=S))
    with pytest.raises(ValueError, match="no encoder"):
        generate(decoder, START, 1, source_BS=source())
    with pytest.raises(ValueError, match="only forescale's own model and a class"):
        generate(torch.nn.Identity(), START, 1, source_BS=source())


def test_what_was_written_can_be_trained_on():
    decoder = Transformer(ModelConfig(depth=1, vocab_size=V, max_sequence_length=S))
    got = generate(decoder, START, 4)
    assert got.shape == (2, 5)
    decoder(got).sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())
