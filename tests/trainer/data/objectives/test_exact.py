"""What holds for the stream of every objective and of packed documents."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from forescale.config.sections.objective import OBJECTIVES
from forescale.data.conversations import prepare
from forescale.data.dataset import Dataset
from forescale.data.objectives.masked import MaskedTokens
from forescale.data.objectives.pairs import Pairs
from forescale.data.objectives.prefix import Prefix
from forescale.data.objectives.spans import Spans
from tests.preferences import make_preferences
from tests.questions import make_conversations
from tests.reversed_words import NO_PAIRS, make_pairs
from tests.trainer.data.objectives import test_pairs, test_preferences, test_responses
from tests.trainer.data.test_bins import packed_feed
from tests.trainer.data.test_stream import collect, make_feed

SPANS = Spans(257, 3, 64)
# From a dataset of plain text and a folder.
FEEDS: dict[str, Callable[..., Any]] = {
    "masked": lambda d, at: plain(d, 64, MaskedTokens(257, 3, 64)),
    "seq2seq": lambda d, at: plain(d, SPANS.window_length, SPANS),
    "prefix": lambda d, at: plain(d, 64, Prefix(64)),
    "packed": lambda d, at: packed_feed({"d": Dataset(d)}, at, 64, documents=True),
    "pairs": lambda d, at: test_pairs.feed_of(Dataset(make_pairs(at / "words", NO_PAIRS))),
    "responses": lambda d, at: test_responses.feed_of(make_conversations(at)),
    "preferences": lambda d, at: test_preferences.feed_of(make_preferences(at)),
}


def plain(dataset, length, objective):
    split = Dataset(dataset).split("train")
    return make_feed({"data": split}, length, 3, 2, objective=objective)


@pytest.mark.parametrize("name", FEEDS)
def test_rows_are_the_same_at_any_world_size_micro_batch_and_resume_point(
    dataset, tmp_path, monkeypatch, name
):
    """6 steps of 8 windows at a world size, resumed after 2: the tensors are those of one rank."""
    monkeypatch.setattr(prepare, "_SHARD_TOKENS", 300)
    feed = FEEDS[name](dataset, tmp_path)
    whole = collect(feed, (0, 6), 0, 1, 8, 8, 1)
    for world, micro, workers in ((1, 4, 0), (2, 2, 1), (4, 1, 2)):
        parts = collect(feed, (0, 2), 0, world, 8, micro, workers)
        parts += collect(feed, (2, 6), parts[-1][0].g1, world, 8, micro, workers)
        for (a, one, digest), (b, many, digest_of_parts) in zip(whole, parts, strict=True):
            assert (a.step, a.targets, digest) == (b.step, b.targets, digest_of_parts)
            for key in ("tokens", "targets"):
                joined = torch.cat([getattr(m, key) for m in many])
                assert torch.equal(getattr(one[0], key), joined)


@pytest.mark.parametrize(
    ("name", "length", "shortest"),
    [
        ("pairs", lambda columns: Pairs(columns, "\t").split, 1),
        ("prefix", lambda columns: Prefix(columns).split, 1),
        ("seq2seq", lambda columns: Spans(100, 0, columns).window_length, 2),
    ],
)
def test_the_shortest_row_is_that_of_its_spec(name, length, shortest):
    columns = OBJECTIVES[name].shortest
    assert length(columns) == shortest
    with pytest.raises(ValueError, match="too few"):
        length(columns - 1)
