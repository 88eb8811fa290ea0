from itertools import product

import pytest

from forescale.models.part import copies


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "expected"),
    [(8, 8, 4, 1), (8, 4, 4, 1), (8, 2, 4, 2), (8, 1, 4, 4), (12, 6, 4, 2), (6, 2, 3, 3)],
)
def test_key_heads_are_sent_as_often_as_their_queries_need(heads, kv_heads, ranks, expected):
    assert copies(heads, kv_heads, ranks) == expected


def test_every_rank_has_the_keys_of_its_own_queries():
    for heads, kv_heads, ranks in product(range(1, 25), range(1, 13), range(1, 9)):
        if heads % kv_heads or heads % ranks:
            continue
        sent = [g for g in range(kv_heads) for _ in range(copies(heads, kv_heads, ranks))]
        queries, alone = heads // ranks, len(sent) // ranks
        for rank, i in product(range(ranks), range(queries)):
            key = sent[rank * alone + i * alone // queries]  # of the rank's i-th query head
            assert key == (rank * queries + i) * kv_heads // heads
