"""Packed windows through the stream: one sequence for all ranks, every token a target once."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.data.bins import PackedKind
from forescale.data.dataset import Damaged, Dataset
from forescale.data.feed import Feed, LostMember
from forescale.data.objective import IGNORED
from forescale.data.stream import StepShare, stream
from tests.trainer.data.small_dataset import flip, write_dataset
from tests.trainer.data.test_stream import collect, make_feed

DOCUMENTS = st.lists(st.integers(1, 90), min_size=1, max_size=6)
SHARDS = st.lists(DOCUMENTS, min_size=1, max_size=4).filter(lambda s: max(map(max, s)) > 1)


def packed_feed(
    datasets: dict[str, Dataset], cache: Path, L: int, seed=3, block=2, **options
) -> Feed:
    splits = {name: d.split("train") for name, d in datasets.items()}
    bins = {n: PackedKind(L).open(s, datasets[n].identity, cache) for n, s in splits.items()}
    return make_feed(splits, L, seed, block, bins=bins, **options)


def triples(pairs) -> list[tuple[int, int]]:
    """Return (input, target) wherever there is a target."""
    pairs = ((x.tokens.numpy(), x.targets.numpy()) for x in pairs)
    return [p for i, t in pairs for p in zip(i[t != IGNORED], t[t != IGNORED], strict=True)]


@given(SHARDS, st.integers(1, 40), st.integers(1, 4), st.booleans())
@settings(max_examples=10, deadline=None)
def test_an_epoch_has_each_next_token_of_each_document_once(shards, L, block, masked):
    with TemporaryDirectory() as folder:
        dataset = Dataset(write_dataset(Path(folder) / "d", shards))
        feed = packed_feed({"d": dataset}, Path(folder), L, block=block, documents=masked)
        order = feed.mixture.orders[0]
        rows = collect(feed, (0, order.windows_per_epoch), 0, 1, 1, 1)
        pairs = [pair for _, micro, _ in rows for pair in triples(micro)]
        split, expected = dataset.split("train"), []
        for shard, lengths in enumerate(shards):
            tokens = split.read(shard, 0, sum(lengths)) if sum(lengths) else []
            for document in np.split(tokens, np.cumsum(lengths)[:-1]):
                expected += pairwise(document)
        assert sorted(pairs) == sorted(expected)
        assert order.targets_per_epoch == len(pairs)
        for batch, micro, _ in rows:
            assert batch.targets == len(triples(micro))
            if masked:
                numbers = micro[0].documents.numpy()
                within = micro[0].targets.numpy()[:, :-1] != IGNORED
                assert not (within & (np.diff(numbers) != 0)).any()


def test_a_damaged_bin_is_substituted_by_one_with_as_many_targets(tmp_path):
    path = write_dataset(tmp_path / "d", [[9, 30, 14, 25, 40, 22, 17, 60, 5, 33]] * 2, member=64)
    sound = list(
        stream(packed_feed({"d": Dataset(path)}, tmp_path, 40), StepShare(4, 1), range(5), 0)
    )
    member = Dataset(path).split("train").shard(1).members[1]
    flip(path / "train-000001.tar", member.tok["offset"])
    with pytest.raises(Damaged, match=f"member {member.key}"):
        list(stream(packed_feed({"d": Dataset(path)}, tmp_path, 40), StepShare(4, 1), range(5), 0))
    feed = packed_feed({"d": Dataset(path)}, tmp_path, 40, substitute=True)
    rows = list(stream(feed, StepShare(4, 1), range(5), 0))
    assert {lost for b in rows for lost in b.lost} == {LostMember("d", 1, member.key)}
    for batch, before in zip(rows, sound, strict=True):
        assert batch.targets == before.targets == len(triples(batch.micro))
    num_equal = sum(
        a.tokens.equal(b.tokens)
        for x, y in zip(rows, sound, strict=True)
        for a, b in zip(x.micro, y.micro, strict=True)
    )
    assert 0 < num_equal < 20
