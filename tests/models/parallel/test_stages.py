"""Which modules the parts of a pipeline have."""

import pytest

from forescale.models.flops import shapes
from forescale.models.parallel.stages import Division, Stage, dealt
from tests.models.configs import model_config


@pytest.mark.parametrize(
    ("costs", "parts", "behind", "expected"),
    [
        ([1] * 8, 4, 0, [2, 2, 2, 2]),
        ([3] * 10, 4, 6, [3, 3, 3, 1]),  # the head counts
        ([1, 1, 1, 9], 2, 0, [3, 1]),
        ([1] * 4, 4, 50, [1, 1, 1, 1]),  # no part without a block
    ],
)
def test_blocks_are_dealt_by_cost(costs, parts, behind, expected):
    blocks = dealt(costs, parts, behind)
    assert [len(part) for part in blocks] == expected
    assert [i for part in blocks for i in part] == [*range(len(costs))]


def test_each_parameter_is_in_one_part_and_lent_to_those_that_read_it():
    words = {
        "num_layers": 6,
        "width": 32,
        "num_heads": 2,
        "position": "relative",
        "mtp_layers": 1,
        "bigram_rows": 7,
    }
    config = model_config(**words, vocab_size=64, max_sequence_length=32).resolved()
    division = Division(config, 4)
    parts = {name: division.part_of(name) for name in shapes(config)}
    assert {*parts.values()} == {0, 1, 2, 3}
    assert parts["embedding.weight"] == parts["relative_position.weight"] == 0
    assert parts["norm.weight"] == parts["mtp.0.join.weight"] == 3
    first, last = (Stage(stage, 2, 2).of(config) for stage in range(2))
    assert first.borrowers("embedding") == first.borrowers("bigrams") == [1]
    assert first.borrowers("blocks.0") == last.borrowers("embedding") == []
    assert last.borrows("relative_position")
    assert not first.reads("norm")
