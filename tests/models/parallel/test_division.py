from itertools import product

import pytest

from forescale.models.config import ModelConfig
from forescale.models.parallel.deal import Ring, shifts
from forescale.models.parallel.division import runs
from forescale.models.parallel.groups import Group, SequenceGroup
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


@pytest.mark.parametrize(
    ("count", "mixers"),
    [
        (2, ["attention"]),
        (2, ["latent", {"kind": "window", "window": 4}]),
        (1, [{"kind": "window", "window": 4}]),
        (1, ["mingru", "attention"]),
        (1, ["gated_deltanet"]),
        (1, ["lstm"]),
    ],
)
def test_columns_are_dealt_out_for_equal_work_or_for_a_state(count, mixers):
    config = ModelConfig(depth=2, mixer_pattern=mixers)
    assert runs(config, 4) == count
    assert runs(config, 1) == 1
    group = [
        SequenceGroup(r, 8, "", Group(r % 2, 2, ""), Group(r // 2, 4, ""), count) for r in range(8)
    ]
    dealt = [each.runs_of(each.rank) for each in group]
    assert sorted(run for each in dealt for run in each) == [*range(8 * count)]
    if count == 2:
        # Of the ranks that exchange heads, each ring has as many keys before its queries.
        assert {sum(run // 2 for run in each) for each in dealt} == {7}
    else:
        assert dealt == [[rank] for rank in range(8)]


@pytest.mark.parametrize(
    ("ring", "expected"),
    [
        (Ring(0, 8, 2), [*range(8)]),
        (Ring(0, 8, 1, causal=0), [*range(8)]),
        (Ring(0, 8, 1, window=4), [0, 1]),
        (Ring(0, 8, 1, window=18), [0, 1, 2]),  # runs have 16 columns
        (Ring(0, 8, 1, window=1), [0]),
        (Ring(0, 8, 2, window=4), [0, 1, 7]),  # a layer of windows among others
        (Ring(0, 8, 1, window=4, global_tokens=1), [*range(8)]),
    ],
)
def test_keys_go_to_those_alone_that_see_them(ring, expected):
    assert shifts(ring, 16) == expected
