"""The table of pairs of tokens: which row a pair has, and which token is before another."""

import torch

from forescale.models.embeddings.bigrams import NONE, before, hashes


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
    assert before(tokens, None, None, None).tolist() == [[NONE, 4, 5, 6], [NONE, 8, 9, 10]]
    starts = torch.tensor([[0, 0, 2, 2], [0, 1, 1, 1]])
    assert before(tokens, None, starts, None).tolist() == [[NONE, 4, NONE, 6], [NONE, NONE, 9, 10]]
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert before(tokens, None, None, real).tolist() == [[NONE, NONE, NONE, 6], [NONE, 8, 9, 10]]
    # The next columns, with a cache that has read one before.
    last, columns = torch.tensor([[3], [2]]), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert before(tokens, last, None, columns).tolist() == [[NONE, 4, 5, 6], [2, 8, 9, 10]]
