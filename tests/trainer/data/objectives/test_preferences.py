"""Preferences in training: two rows each, of which only the last response is a target."""

from collections import Counter

import numpy as np
import pytest
import torch

from forescale.data.bin_kinds import PreferenceKind
from forescale.data.bins import Bins
from forescale.data.conversations import prepare
from forescale.data.feed import Feed
from forescale.data.objective import IGNORED
from forescale.data.objectives.responses import Preferences
from forescale.data.stream import validation_windows
from tests.preferences import make_preferences, preferences
from tests.questions import plain_template
from tests.trainer.data.objectives.test_responses import rows_of
from tests.trainer.data.test_stream import collect, make_feed

COLUMNS = 64
OBJECTIVE = Preferences(COLUMNS, beta=0.1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_SHARD_TOKENS", 500)
        yield make_preferences(tmp_path_factory.mktemp("preferences"))


def bins_of(dataset, split="train", columns=COLUMNS):
    kind = PreferenceKind(columns)
    return Bins.open(kind, dataset.split(split), dataset.identity, dataset.path.parent)


def feed_of(dataset, **options) -> Feed:
    split, bins = dataset.split("train"), bins_of(dataset)
    settings = {"bins": {"d": bins}, "objective": OBJECTIVE}
    return make_feed({"d": split}, OBJECTIVE.window_length, 3, 2, **settings, **options)


def expected(row) -> tuple[tuple[bytes, bytes], ...]:
    """The text of the chosen and the rejected row, and the text of their targets."""
    sides = []
    for side in ("chosen", "rejected"):
        if isinstance(row["prompt"], str):
            parts = row["prompt"], f"{row[side]}$"
        else:
            *before, last = plain_template().pieces([*row["prompt"], *row[side]])
            parts = "".join(piece.text for piece in before), last.text
        text, target = ("".join(parts), parts[1])
        sides.append(tuple(x.replace("<|endoftext|>", "$").encode() for x in (text, target)))
    return tuple(sides)


def twos(rows: list) -> list[tuple]:
    return list(zip(rows[::2], rows[1::2], strict=True))


def test_each_comes_once_an_epoch_as_two_rows_with_the_last_response_as_targets(dataset):
    feed = feed_of(dataset)
    count = feed.mixture.orders[0].windows_per_epoch
    assert count == 48
    pairs = []
    for first in (0, count):
        ((batch, micro, _),) = collect(feed, (0, 1), first, 1, count, 8)
        assert [len(m.tokens) for m in micro] == [16] * 6
        assert batch.targets == count, "a preference is one target"
        pairs.append(twos([row for m in micro for row in rows_of(m, dataset.end_of_text)]))
    held_out = bins_of(dataset, "validation")
    micros = validation_windows(
        dataset.split("validation"), OBJECTIVE.window_length, 5, objective=OBJECTIVE, bins=held_out
    )
    last = twos([row for m in micros for row in rows_of(m, dataset.end_of_text)])
    assert Counter(pairs[0] + last) == Counter(map(expected, preferences()))
    assert Counter(pairs[0]) == Counter(pairs[1])
    assert pairs[0] != pairs[1], "in another order"


def numbered(dataset, split: str) -> np.ndarray:
    """A reference that says which preference it is of."""
    count = int(bins_of(dataset, split).counts.sum())
    return np.stack([np.arange(count), -np.arange(count)], 1).astype(np.float32)


def test_a_reference_follows_its_preference_in_every_order(dataset):
    """Held-out order numbers the preferences; the training order must hand the same numbers."""
    plain = validation_windows(
        dataset.split("train"),
        OBJECTIVE.window_length,
        4,
        objective=OBJECTIVE,
        bins=bins_of(dataset),
        references=numbered(dataset, "train"),
    )
    known = {}
    for micro in plain:
        for rows, reference in zip(
            micro.tokens.view(-1, 2, COLUMNS), micro.references, strict=True
        ):
            known[rows.numpy().tobytes()] = reference.tolist()
    feed = feed_of(dataset, references={"d": numbered(dataset, "train")})
    ((_, micros, _),) = collect(feed, (0, 1), 5, 1, 40, 8)
    count = 0
    for micro in micros:
        for rows, reference in zip(
            micro.tokens.view(-1, 2, COLUMNS), micro.references, strict=True
        ):
            assert known[rows.numpy().tobytes()] == reference.tolist()
            count += 1
    assert count == 40


def test_missing_rows_of_held_out_preferences_are_padding(dataset):
    *_, last = validation_windows(
        dataset.split("validation"),
        OBJECTIVE.window_length,
        8,
        objective=OBJECTIVE,
        bins=bins_of(dataset, "validation"),
        references=numbered(dataset, "validation"),
    )
    assert last.references[:, 0].tolist() == [8, 9, 10, 11, 0, 0, 0, 0]
    assert torch.all(last.targets[8:] == IGNORED)


def test_what_has_a_side_longer_than_a_row_is_left_out_and_counted(dataset):
    bins = bins_of(dataset, columns=12)
    assert 0 < bins.counts.sum() < 48
    assert f"{48 - bins.counts.sum()} longer than a window" in bins.left_out()
