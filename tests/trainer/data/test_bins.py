"""Tables of bins: packed documents and pairs, in files whose damage is found, and in the stream."""

import shutil
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forescale.data.bin_kinds
from forescale.data.bin_kinds import PackedKind, PairKind
from forescale.data.bins import Bins
from forescale.data.dataset import Damaged, Dataset, Split
from forescale.data.feed import Feed, LostMember
from forescale.data.objective import IGNORED
from forescale.data.packing import pack
from forescale.data.prepare.writer import ShardWriter
from forescale.data.stream import StepShare, stream
from forescale.ground.errors import UserError
from forescale.remote.store import Store
from tests.reversed_words import NO_PAIRS, make_pairs
from tests.trainer.data.small_dataset import END, flip, write_dataset
from tests.trainer.data.test_stream import collect, make_feed

# Uneven shards, down to those without a target; members of 64 tokens cut documents in two.
SHARDS = st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=12), min_size=1, max_size=4)
DOCUMENTS = [[7, 30, 2, 2, 9], [1], [70, 70, 3, 1, 25]]


@pytest.fixture
def opened(tmp_path):
    return Dataset(write_dataset(tmp_path / "d", DOCUMENTS, [[5, 6]]))


def bins_of(dataset: Dataset, cache: Path, L: int = 8, split: str = "train", **options) -> Bins:
    return Bins.open(PackedKind(L), dataset.split(split), dataset.identity, cache, **options)


def all_pieces(bins: Bins) -> list[list[list[tuple[int, int]]]]:
    """Return for every shard its bins, for every bin its pieces."""
    return [[bins.pieces(s, b) for b in range(n)] for s, n in enumerate(bins.counts.tolist())]


def test_missing_targets_are_counted_over_all_bins(opened, tmp_path):
    bins = bins_of(opened, tmp_path)
    for shards in ([0], [2, 0], [1, 2], [2, 1, 0]):
        shard = np.repeat(shards, bins.counts[shards])
        number = np.concatenate([np.arange(n) for n in bins.counts[shards]])
        lacking = 9 - bins.cut(shard, number)[1]
        which, lacks = bins.short(np.array(shards))
        assert (which == np.flatnonzero(lacking)).all()
        assert (lacks == lacking[which]).all()
    assert bins.counts[1] == bins.targets[1] == 0


def test_a_bin_can_be_cut_to_a_number_of_targets(opened, tmp_path):
    bins = bins_of(opened, tmp_path, 40)
    shard, number, whole = next(
        (shard, number, pieces)
        for shard, of_shard in enumerate(all_pieces(bins))
        for number, pieces in enumerate(of_shard)
        if len(pieces) > 2
    )
    count = sum(length - 1 for _, length in whole)
    for targets in range(1, count + 1):
        taken = bins.pieces(shard, number, targets)
        assert sum(length - 1 for _, length in taken) == targets
        assert [start for start, _ in taken] == [start for start, _ in whole[: len(taken)]]
        assert taken[:-1] == whole[: len(taken) - 1]
        assert 2 <= taken[-1][1] <= whole[len(taken) - 1][1]
    assert taken == whole


def test_tables_are_computed_once_per_dataset_split_and_length(opened, tmp_path):
    calls = []

    def progress(phase, done, total, unit, *, tokens=0):
        calls.append((phase, done, total))

    first = all_pieces(bins_of(opened, tmp_path, progress=progress))
    assert calls[-1] == ("pack documents", 220, 220)
    calls.clear()
    again = bins_of(opened, tmp_path, progress=progress)
    assert not calls
    assert all_pieces(again) == first
    assert all_pieces(bins_of(opened, tmp_path, 9)) != first
    assert len(all_pieces(bins_of(opened, tmp_path, split="validation"))) == 1
    other = Dataset(write_dataset(tmp_path / "other", DOCUMENTS[::-1]))
    assert all_pieces(bins_of(other, tmp_path)) == first[::-1]
    files = list((tmp_path / "packing").iterdir())
    assert len(files) == 4
    for shard, lengths in enumerate(DOCUMENTS):
        fresh = pack(np.array(lengths), 8)
        for name in ("offsets", "starts", "lengths"):
            assert (getattr(again.table(shard), name) == getattr(fresh, name)).all()


def test_a_document_that_continues_in_another_shard_is_packed_too(tmp_path):
    writer = ShardWriter(tmp_path, "train-000000", np.dtype("uint16"), 64)
    writer.add(np.arange(30))
    writer.add(np.arange(20))
    writer._ends.pop()
    writer.documents = 1
    row, _ = writer.finish()
    whole = {"tokens": 50, "documents": 1, "bytes": 49, "shards": [row]}
    split = Split(Store(tmp_path), "train", whole, "uint16")
    bins = Bins.open(PackedKind(30), split, "0" * 64, tmp_path)
    assert all_pieces(bins) == [[[(0, 30)], [(30, 20)]]]


@pytest.mark.slow  # each byte
def test_damage_is_reported_before_a_table_is_used(opened, tmp_path):
    bins = bins_of(opened, tmp_path)
    path, good, right = bins.path, bins.path.read_bytes(), all_pieces(bins)
    bad = [good[:at] for at in range(len(good))]
    bad += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good))]
    bad += [good + b"\0", b"\0" + good, good + good]
    for raw in bad:
        path.write_bytes(raw)
        problem = r"\.v2: damaged: .*; delete the file; it is computed again\."
        with pytest.raises(UserError, match=problem):
            bins_of(opened, tmp_path).short(np.arange(3))
    path.unlink()
    assert all_pieces(bins_of(opened, tmp_path)) == right


def test_a_table_of_something_else_is_refused(opened, tmp_path):
    eight, nine = (bins_of(opened, tmp_path, L).path for L in (8, 9))
    shutil.copy(eight, nine)
    with pytest.raises(UserError, match="its contents don't match its name"):
        bins_of(opened, tmp_path, 9)


@dataclass
class Tokens:
    """A split of shards in memory; no document need end with its shard."""

    shards: list[list[int]]
    name = "train"

    @property
    def shard_tokens(self):
        return [len(shard) for shard in self.shards]

    def read(self, shard, start, length):
        return np.array(self.shards[shard][start : start + length], np.uint16)

    def document_ends(self, shard, start, length):
        return 1 + np.flatnonzero(self.read(shard, start, length) == END)


# 7 is the separator; a shard may break a document, or be empty.
BROKEN = st.lists(
    st.lists(st.sampled_from([1, 1, 2, 7, END]), max_size=40).map(list), min_size=1, max_size=4
)


def expected(shards, source, target) -> tuple[list[list[tuple[list[int], list[int]]]], int]:
    """Pairs of each shard, by a loop over tokens, and the number of parts of documents."""
    shards_of_pairs, parts, goes_on = [], 0, False
    for shard in shards:
        of_shard, document = [], []
        for place, token in enumerate(shard):
            document.append(token)
            if token != END and place + 1 < len(shard):
                continue
            parts += 1
            is_whole = token == END and not goes_on
            goes_on = token != END
            if is_whole and 7 in document:
                cut = document.index(7)
                a, b = document[:cut], document[cut + 1 :]
                if 0 < len(a) <= source and 0 < len(b) <= target:
                    of_shard.append((a, b))
            document = []
        shards_of_pairs.append(of_shard)
    return shards_of_pairs, parts


@given(BROKEN, st.integers(1, 5), st.integers(1, 6), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_pairs_are_those_that_a_loop_over_tokens_finds(shards, source, target, block):
    split = Tokens(shards)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(forescale.data.bin_kinds, "_BLOCK", block)  # a document lies in several
        bins = Bins.open(PairKind(7, source, target), split, "0" * 64, Path(folder))
        pairs_of, parts = expected(shards, source, target)
        assert bins.counts.tolist() == [len(pairs) for pairs in pairs_of]
        for shard, pairs in enumerate(pairs_of):
            assert bins.targets[shard] == sum(len(b) for _, b in pairs)
            for number, (a, b) in enumerate(pairs):
                (first, before), (cut, after) = bins.pieces(shard, number)
                assert first + before == cut
                assert shards[shard][first:cut] == a
                assert shards[shard][cut : cut + after] == [7, *b]
        facts = bins.facts
        tokens = sum(len(a) + 1 + len(b) for pairs in pairs_of for a, b in pairs)
        assert facts["row_tokens"] == tokens
        assert facts["documents"] == parts
        assert sum(facts[reason] for reason in PairKind.reasons) == parts - bins.counts.sum()


def test_what_is_left_out_is_counted_by_its_reason(tmp_path):
    dataset = Dataset(make_pairs(tmp_path / "words", NO_PAIRS))
    kind = PairKind(9, 6, 6)
    bins = [
        Bins.open(kind, dataset.split(s), dataset.identity, tmp_path)
        for s in ("train", "validation")
    ]
    facts = {name: sum(b.facts[name] for b in bins) for name in PairKind.reasons}
    assert facts.pop("too_long") == 2
    assert {name for name, count in facts.items() if count} == {
        "without_separator",
        "without_source",
    }
    assert max(b.facts["longest_source"] for b in bins) == len("too long") * 9
    assert max(b.facts["longest_target"] for b in bins) == len("too long") * 9 + 1


def test_a_table_is_made_once_and_never_believed_if_it_is_damaged(tmp_path):
    dataset = Dataset(make_pairs(tmp_path / "words"))
    split, kind = dataset.split("train"), PairKind(9, 6, 6)
    Bins.open(kind, split, dataset.identity, tmp_path)
    (path,) = (tmp_path / "pairs").iterdir()
    assert Bins.open(kind, Tokens([[]]), dataset.identity, tmp_path).counts.any(), "not scanned"
    other = Bins.open(PairKind(9, 1, 6), split, dataset.identity, tmp_path)
    assert other.facts["too_long"] > 100, "a table of its own"
    flip(path, 8)
    with pytest.raises(UserError, match="delete the file"):
        Bins.open(kind, split, dataset.identity, tmp_path).pieces(0, 0)


PACKED_DOCUMENTS = st.lists(st.integers(1, 90), min_size=1, max_size=6)
PACKED_SHARDS = st.lists(PACKED_DOCUMENTS, min_size=1, max_size=4).filter(
    lambda s: max(map(max, s)) > 1
)


def packed_feed(
    datasets: dict[str, Dataset], cache: Path, L: int, seed=3, block=2, **options
) -> Feed:
    splits = {name: d.split("train") for name, d in datasets.items()}
    bins = {n: Bins.open(PackedKind(L), s, datasets[n].identity, cache) for n, s in splits.items()}
    return make_feed(splits, L, seed, block, bins=bins, **options)


def triples(pairs) -> list[tuple[int, int]]:
    """Return (input, target) wherever there is a target."""
    pairs = ((x.tokens.numpy(), x.targets.numpy()) for x in pairs)
    return [p for i, t in pairs for p in zip(i[t != IGNORED], t[t != IGNORED], strict=True)]


@given(PACKED_SHARDS, st.integers(1, 40), st.integers(1, 4), st.booleans())
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
