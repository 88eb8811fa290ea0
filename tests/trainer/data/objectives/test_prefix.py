"""The rest of a text: a row is the window's tokens, cut where its length says."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forescale.data.dataset import Dataset
from forescale.data.objective import IGNORED
from forescale.data.objectives.prefix import Prefix
from forescale.data.stream import validation_windows


@given(
    columns=st.integers(2, 200),
    place=st.floats(0, 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 999),
)
def test_source_and_inputs_of_the_decoder_are_the_window_and_each_predicts_the_next(
    columns, place, share, seed
):
    objective = Prefix(columns, share)
    sizes = np.array([columns + 1, 1 + round(place * columns)])
    text = np.random.default_rng(seed).integers(1, 300, (2, columns + 1)).astype("<u2")
    text[1, sizes[1] :] = 0
    inputs, targets = objective.examples(text, sizes, np.arange(2))
    mask, counts = objective.padding_mask(sizes), objective.num_targets(sizes)
    assert inputs.shape == targets.shape == (2, columns)
    assert (mask is None) == (sizes[1] == columns + 1)
    split, real = objective.split, targets != IGNORED
    assert real.sum(1).tolist() == counts.tolist()
    assert not real[:, :split].any()
    assert inputs[0].tolist() == text[0, :-1].tolist()
    assert targets[0, split:].tolist() == text[0, split + 1 :].tolist()
    if mask is None:
        return
    assert mask[0].all()
    if sizes[1] < 3:  # one input is too few for a source and a target
        assert not mask[1].any()
        assert not counts[1]
        return
    assert inputs[1][mask[1]].tolist() == text[1, : sizes[1] - 1].tolist()
    assert not inputs[1][~mask[1]].any()
    assert mask[1, split - 1], "the source ends at the split"
    assert np.array_equal(mask[1, split:], real[1, split:])
    assert targets[1][real[1]].tolist() == text[1, sizes[1] - counts[1] : sizes[1]].tolist()


def test_the_source_has_its_share():
    assert Prefix(100, 0.25).split == 25
    assert Prefix(100, 0.25).num_targets(np.array([101, 41])).tolist() == [75, 30]
    assert Prefix(10, 0.001).split == 1
    assert Prefix(10, 0.999).split == 9


def test_held_out_targets_are_the_ends_of_the_windows(dataset):
    split, objective = Dataset(dataset).split("validation"), Prefix(64, 0.75)
    targets_of_rows, expected = [], []
    for m in validation_windows(split, 64, 3, objective=objective):
        targets_of_rows += m.targets[m.targets != IGNORED].tolist()
    for shard, size in enumerate(split.shard_tokens):
        for start in range(0, size - 1, 64):
            length = min(65, size - start)
            count = int(objective.num_targets(np.array(length)))
            expected += split.read(shard, start + length - count, count).tolist() if count else []
    assert targets_of_rows == expected
