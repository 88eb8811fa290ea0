"""Tables of tokens and pairs, and token shift, against plain sums; and their rules."""

import torch

from forescale.models import Transformer
from forescale.models.mixers.context import Context
from forescale.models.tables import NONE, hashes, previous
from tests.models.configs import changed, model_config

BASE = model_config(
    num_layers=3,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=24,
    vocab_size=50,
    max_sequence_length=16,
    init_std=0.3,
)
X = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def test_a_model_with_them_begins_as_one_without():
    got = []
    for keys in ({}, dict(value_embedding=1, bigram_rows=31, mixer__token_shift=True)):
        torch.manual_seed(0)
        got.append(Transformer(changed(BASE, **keys)).eval()(X))
    assert torch.equal(*got)


def test_value_embeddings_are_of_every_so_manieth_layer_from_the_last():
    layers = [changed(BASE, value_embedding=n).value_layers for n in range(4)]
    assert layers == [[], [0, 1, 2], [0, 2], [2]]


def test_values_have_what_the_token_adds_to_them():
    mixer, x_BLD = BASE.mixer.build(BASE), torch.randn(2, 12, 32)
    added_BLD = torch.randn(2, 12, 16)
    plain = mixer(x_BLD, Context())
    got = mixer(x_BLD, Context(token_values=added_BLD))
    # Attention averages values linearly: of zero values it averages the added ones alone.
    mixer.value.weight.data.zero_()
    alone = mixer(x_BLD, Context(token_values=added_BLD))
    torch.testing.assert_close(got, plain + alone, rtol=1e-4, atol=1e-5)
    assert alone.abs().max() > 0.1


@torch.no_grad()
def test_queries_keys_and_values_have_a_part_of_those_before():
    """As if each matrix read the token, and weighed rows of it the token before."""
    config = changed(BASE, mixer__token_shift=True).resolved()
    mixer, plain = config.mixer.build(config), BASE.mixer.build(BASE)
    x_BLD = torch.randn(2, 12, 32)
    plain.load_state_dict({n: p for n, p in mixer.state_dict().items() if "_shift" not in n})
    for name in ("query", "key", "value"):
        weight, matrix = getattr(mixer, f"{name}_shift").weight.normal_(), getattr(plain, name)

        def whole(x_BLD, matrix=matrix.weight, weight=weight):
            y_BLD = x_BLD @ matrix.T
            for i in range(x_BLD.shape[1] - 1, 0, -1):
                y_BLD[:, i] += weight * y_BLD[:, i - 1]
            return y_BLD

        matrix.forward = whole
    torch.testing.assert_close(mixer(x_BLD, Context()), plain(x_BLD, Context()))


def test_pairs_spread_over_the_rows_and_depend_on_both_tokens_and_their_order():
    ids = torch.arange(256)
    pairs = hashes(ids[:, None].expand(256, 256), ids[None].expand(256, 256), 4096)
    assert pairs.min() >= 0
    load = pairs.flatten().bincount(minlength=4096).double()
    assert len(load) == 4096
    assert load.std() < 2 * 16**0.5, "as 65,536 pairs thrown at random: 16 each, with deviation 4"
    assert (pairs == pairs.T).double().mean() < 0.01
    assert hashes(torch.tensor([[5]]), torch.tensor([[NONE]]), 7).item() in range(7)


def test_ids_beyond_the_rows_differ_still():
    """A small table of a large vocabulary: pairs of the same low bits don't always meet."""
    tokens = torch.arange(64)[None] * 4096
    assert len(hashes(tokens, torch.full_like(tokens, 3), 4096).unique()) > 48


def test_the_token_before_is_one_that_is_seen():
    tokens = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]])
    assert previous(tokens, None, None, None).tolist() == [[NONE, 4, 5, 6], [NONE, 8, 9, 10]]
    starts = torch.tensor([[0, 0, 2, 2], [0, 1, 1, 1]])
    rows = [[NONE, 4, NONE, 6], [NONE, NONE, 9, 10]]
    assert previous(tokens, None, starts, None).tolist() == rows
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert previous(tokens, None, None, real).tolist() == [[NONE, NONE, NONE, 6], [NONE, 8, 9, 10]]
    # The next columns, with a cache that has read one before.
    last, columns = torch.tensor([[3], [2]]), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert previous(tokens, last, None, columns).tolist() == [[NONE, 4, 5, 6], [2, 8, 9, 10]]
