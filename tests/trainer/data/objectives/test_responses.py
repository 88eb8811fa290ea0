"""Conversations in training: a row each, and only what is of a response is a target."""

from collections import Counter

import numpy as np
import pytest

from forescale.data.bin_kinds import ConversationKind, PackedConversationKind
from forescale.data.bins import Bins
from forescale.data.conversations import prepare
from forescale.data.dataset import Dataset
from forescale.data.feed import Feed
from forescale.data.objective import IGNORED
from forescale.data.objectives.responses import Responses
from forescale.data.stream import validation_windows
from forescale.ground.errors import UserError
from tests.questions import make_conversations
from tests.trainer.data.conversations.test_prepare import texts
from tests.trainer.data.small_dataset import write_dataset
from tests.trainer.data.test_stream import collect, make_feed

COLUMNS = 64


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_SHARD_TOKENS", 300)
        yield make_conversations(tmp_path_factory.mktemp("conversations"))


def bins_of(dataset, split="train", columns=COLUMNS, kind=ConversationKind):
    kind = kind(columns)
    return Bins.open(kind, dataset.split(split), dataset.identity, dataset.path.parent)


def feed_of(dataset) -> Feed:
    split, bins = dataset.split("train"), bins_of(dataset)
    return make_feed({"d": split}, COLUMNS, 3, 2, bins={"d": bins}, objective=Responses())


def rows_of(micro, end) -> list[tuple[bytes, bytes]]:
    """All text of each row, as far as it is read or learned, and the text of its targets."""
    conversations = []
    for tokens, targets in zip(micro.tokens.numpy(), micro.targets.numpy(), strict=True):
        at = np.flatnonzero(targets != IGNORED)
        if not len(at):
            continue
        assert np.array_equal(targets[at[:-1]][np.diff(at) == 1], tokens[at[1:]][np.diff(at) == 1])
        whole = [*tokens[: at[-1] + 1], targets[at[-1]]]
        assert not tokens[at[-1] + 1 :].any(), "padding"
        text, answer = ([ord("$") if i == end else i for i in ids] for ids in (whole, targets[at]))
        conversations.append((bytes(text), bytes(answer)))
    return conversations


def test_each_example_comes_once_an_epoch_with_its_responses_as_targets(dataset):
    feed = feed_of(dataset)
    order = feed.mixture.orders[0]
    epochs = []
    for epoch in range(2):
        g = epoch * order.windows_per_epoch
        ((batch, micro, _),) = collect(feed, (0, 1), g, 1, order.windows_per_epoch, 1)
        epochs.append([row for m in micro for row in rows_of(m, dataset.end_of_text)])
        assert Counter(epochs[-1]) == Counter(texts(dataset, "train"))
        assert batch.targets == sum(len(learned) for _, learned in epochs[-1])
    assert epochs[0] != epochs[1], "in another order"


def test_packed_rows_hold_each_example_once_apart_from_the_others(dataset):
    columns, split = 3 * COLUMNS, dataset.split("train")
    bins = bins_of(dataset, columns=columns, kind=PackedConversationKind)
    feed = make_feed(
        {"d": split}, columns, 3, 2, bins={"d": bins}, objective=Responses(), documents=True
    )
    rows = int(bins.counts.sum())
    assert bins.facts["row_tokens"] > 0.75 * rows * columns, "few columns are padding"
    ((batch, micros, _),) = collect(feed, (0, 1), 0, 1, rows, 1)
    conversations = Counter()
    for micro in micros:
        arrays = (micro.tokens.numpy(), micro.targets.numpy(), micro.documents.numpy())
        for tokens, targets, documents in zip(*arrays, strict=True):
            for number in range(documents.max() + 1):
                of = documents == number
                ids, learned = tokens[of], targets[of]
                at = np.flatnonzero(learned != IGNORED)
                if len(at):
                    whole = [*ids[: at[-1] + 1], learned[at[-1]]]
                    both = (
                        [ord("$") if i == dataset.end_of_text else i for i in part]
                        for part in (whole, learned[at])
                    )
                    conversations[tuple(map(bytes, both))] += 1
    assert conversations == Counter(texts(dataset, "train"))
    assert batch.targets == sum(len(learned) for _, learned in conversations.elements())


def test_held_out_conversations_come_in_their_order(dataset):
    split, bins = dataset.split("validation"), bins_of(dataset, "validation")
    micros = validation_windows(split, COLUMNS, 5, objective=Responses(), bins=bins)
    conversations = [row for m in micros for row in rows_of(m, dataset.end_of_text)]
    assert conversations == texts(dataset, "validation")


def test_what_is_longer_than_a_row_is_left_out_and_counted(dataset):
    sizes = [len(text) for text, _ in texts(dataset, "train")]
    bins = bins_of(dataset, columns=20)
    assert bins.counts.sum() == sum(size <= 21 for size in sizes)
    assert f"{sum(size > 21 for size in sizes)} longer than a window" in bins.left_out()
    assert f"the longest has {max(sizes)} tokens" in bins.left_out()


def test_a_dataset_that_says_nothing_of_responses_is_refused(tmp_path):
    plain = Dataset(write_dataset(tmp_path / "plain", [[3, 4]]))
    with pytest.raises(UserError, match="doesn't say which of its tokens are responses"):
        bins_of(plain)
