"""Counts and layouts of patterns against loops over all pairs; their keys in a config."""

import pytest

from forescale.models.mixers.patterns import Sparse, Stretch
from tests.models.configs import model_config
from tests.models.mixers.test_sparse import PATTERNS, joins


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
    visible = {j for b in range(1000) for j in sparse.drawn(b)}
    assert 750 < len(visible) < 850, "1 - (j / 1000)^4 of blocks j, four fifths of all"


def test_what_is_read_grows_with_the_length_and_not_its_square():
    for pattern in (Stretch(128), Stretch(128, 4), Sparse("bigbird", 64, 3, 1, 2)):
        short, long = (pattern.layout(n) for n in (2048, 16384))
        assert short.reads == long.reads
        assert long.num_blocks == 8 * short.num_blocks
    strided = Sparse("strided", 64, 16)
    assert strided.layout(16384).reads < 16384 / 5


SMALL = dict(depth=2, max_sequence_length=128)


@pytest.mark.parametrize(
    ("args", "field", "text"),
    [
        (dict(mixer="window"), "window", "no width"),
        (dict(mixer="window", mixer__window=0), "window", "no window"),
        (dict(mixer="window", mixer__window=129), "window", "more than the context's 128"),
        (
            dict(mixer="window", mixer__window=8, mixer__global_tokens=-1),
            "global_tokens",
            "negative",
        ),
        (
            dict(mixer="window", mixer__window=8, mixer__global_tokens=200),
            "global_tokens",
            "context's 128",
        ),
        (dict(mixer="block_sparse", mixer__pattern="dense"), "pattern", "unknown"),
        (dict(mixer="block_sparse", mixer__block=0), "block", "not a size"),
        (dict(mixer="block_sparse", mixer__block=8, mixer__local=1), "local", "too little"),
        (dict(mixer="block_sparse", mixer__block=64, mixer__local=4), "local", "context"),
        (
            dict(mixer="block_sparse", mixer__block=8, mixer__random_blocks=3),
            "random_blocks",
            "strided",
        ),
        (
            dict(
                mixer="block_sparse",
                mixer__pattern="bigbird",
                mixer__block=8,
                mixer__global_blocks=-1,
            ),
            "global_blocks",
            "negative",
        ),
        (dict(mixer="window", mixer__window=8, causal=False), "causal", "later ones"),
        (dict(mixer="window", mixer__window=8, position="alibi"), "position", "alibi"),
    ],
)
def test_a_bad_key_gets_its_sentence(args, field, text):
    problems = model_config(**SMALL | args).problems()
    field = field if field in ("causal", "position") else f"mixer.{field}"
    assert [(name, text in problem) for name, problem, _ in problems] == [(field, True)], problems


def test_good_keys_have_no_problem():
    for args in (
        dict(mixer="window", mixer__window=128),
        dict(mixer_pattern=["window", "attention"], mixer__window=16, mixer__global_tokens=4),
        dict(mixer="block_sparse", mixer__block=16),
        dict(mixer="block_sparse", mixer__block=16, mixer__pattern="bigbird", mixer__local=1),
    ):
        assert model_config(**SMALL | args).problems() == []
    assert model_config(depth=2, mixer="window", mixer__window=129).problems(sequence_length=128)
