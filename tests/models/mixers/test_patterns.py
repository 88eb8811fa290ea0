"""Counts and layouts of patterns against loops over all pairs; their keys in a config."""

import pytest

from forescale.models import ModelConfig
from forescale.models.mixers.patterns import Sparse, Window
from tests.models.mixers.test_block_attention import PATTERNS, joins


@pytest.mark.parametrize("length", [1, 3, 12, 40, 64, 67])
@pytest.mark.parametrize("name", PATTERNS)
def test_pairs_are_those_that_see_each_other(name, length):
    pattern = PATTERNS[name]
    pairs = sum(joins(pattern, i, j) for i in range(length) for j in range(i + 1))
    assert pattern.pairs(length) == pairs


def test_random_blocks_are_fixed_distinct_and_seen_by_no_other_rule():
    sparse = Sparse("bigbird", 16, 3, 2, 4, layer=5)
    for block in range(100):
        drawn = sparse.drawn(block)
        assert drawn == sparse.drawn(block)
        assert len(set(drawn)) == len(drawn) == max(0, min(4, block - 4))
        assert all(2 <= j <= block - 3 for j in drawn)
    other = Sparse("bigbird", 16, 3, 2, 4, layer=6)
    assert sum(sparse.drawn(b) == other.drawn(b) for b in range(20, 100)) < 5
    seen = {j for b in range(1000) for j in sparse.drawn(b)}
    assert 750 < len(seen) < 850, "1 - (j / 1000)^4 of blocks j, four fifths of all"


def test_what_is_read_grows_with_the_length_and_not_its_square():
    for pattern in (Window(128), Window(128, 4), Sparse("bigbird", 64, 3, 1, 2)):
        short, long = (pattern.layout(n) for n in (2048, 16384))
        assert short.reads == long.reads
        assert long.num_blocks == 8 * short.num_blocks
    strided = Sparse("strided", 64, 16)
    assert strided.layout(16384).reads < 16384 / 5


SMALL = dict(depth=2, max_sequence_length=128)


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        (dict(mixer="window"), "window", "no width"),
        (dict(mixer="window", window=0), "window", "no window"),
        (dict(mixer="window", window=129), "window", "more than the context's 128"),
        (dict(mixer="window", window=8, global_tokens=-1), "global_tokens", "negative"),
        (dict(mixer="window", window=8, global_tokens=200), "global_tokens", "context's 128"),
        (dict(window=8), "window", "no effect without mixer window"),
        (dict(mixer_pattern=["attention"], mixer="window", window=8), "window", "no effect"),
        (dict(global_tokens=8), "global_tokens", "no effect"),
        (dict(sparse_block=8), "sparse_block", "no effect without mixer block_sparse"),
        (dict(mixer="block_sparse", sparse_pattern="dense"), "sparse_pattern", "unknown"),
        (dict(mixer="block_sparse", sparse_block=0), "sparse_block", "not a size"),
        (dict(mixer="block_sparse", sparse_block=8, sparse_local=1), "sparse_local", "too little"),
        (dict(mixer="block_sparse", sparse_block=64, sparse_local=4), "sparse_local", "context"),
        (dict(mixer="block_sparse", sparse_block=8, sparse_random=3), "sparse_random", "strided"),
        (
            dict(mixer="block_sparse", sparse_pattern="bigbird", sparse_block=8, sparse_global=-1),
            "sparse_global",
            "negative",
        ),
        (dict(mixer="window", window=8, causal=False), "causal", "later ones"),
        (dict(mixer="window", window=8, position="alibi"), "position", "alibi"),
    ],
)
def test_a_bad_key_gets_its_sentence(given, field, said):
    problems = ModelConfig(**SMALL | given).problems()
    assert [(name, said in problem) for name, problem, _ in problems] == [(field, True)], problems


def test_good_keys_have_no_problem():
    for given in (
        dict(mixer="window", window=128),
        dict(mixer_pattern=["window", "attention"], window=16, global_tokens=4),
        dict(mixer="block_sparse", sparse_block=16),
        dict(mixer="block_sparse", sparse_block=16, sparse_pattern="bigbird", sparse_local=1),
    ):
        assert ModelConfig(**SMALL | given).problems() == []
    assert ModelConfig(depth=2, mixer="window", window=129).problems(sequence_length=128)
