"""Which documents are pairs: each document is in the table once, or counted once as left out."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from forescale.data.dataset import Dataset
from forescale.data.objectives import pair_table
from forescale.data.objectives.pair_table import LEFT_OUT, PairKind, separator_id
from forescale.data.tokenizer import byte_tokenizer
from forescale.errors import UserError
from tests.reversed_words import NO_PAIRS, make_pairs
from tests.trainer.data.small_dataset import END


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
SHARDS = st.lists(
    st.lists(st.sampled_from([1, 1, 2, 7, END]), max_size=40).map(list), min_size=1, max_size=4
)


def expected(shards, source, target) -> tuple[list[list[tuple[list[int], list[int]]]], int]:
    """Pairs of each shard, by a loop over tokens, and the number of parts of documents."""
    found, parts, goes_on = [], 0, False
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
        found.append(of_shard)
    return found, parts


@given(SHARDS, st.integers(1, 5), st.integers(1, 6), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_pairs_are_those_that_a_loop_over_tokens_finds(shards, source, target, block):
    split = Tokens(shards)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_table, "_BLOCK", block)  # a document lies in several
        bins = PairKind(7, source, target).open(split, "0" * 64, Path(folder))
        wanted, parts = expected(shards, source, target)
        assert bins.counts.tolist() == [len(pairs) for pairs in wanted]
        for shard, pairs in enumerate(wanted):
            assert bins.targets[shard] == sum(len(b) for _, b in pairs)
            for number, (a, b) in enumerate(pairs):
                (first, before), (cut, after) = bins.pieces(shard, number)
                assert first + before == cut
                assert shards[shard][first:cut] == a
                assert shards[shard][cut : cut + after] == [7, *b]
        facts = bins.facts
        tokens = sum(len(a) + 1 + len(b) for pairs in wanted for a, b in pairs)
        assert facts["row_tokens"] == tokens
        assert facts["documents"] == parts
        assert sum(facts[reason] for reason in LEFT_OUT) == parts - bins.counts.sum()


def test_what_is_left_out_is_counted_by_its_reason(tmp_path):
    dataset = Dataset(make_pairs(tmp_path / "words", NO_PAIRS))
    kind = PairKind(9, 6, 6)
    bins = [
        kind.open(dataset.split(s), dataset.identity, tmp_path) for s in ("train", "validation")
    ]
    facts = {name: sum(b.facts[name] for b in bins) for name in LEFT_OUT}
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
    kind.open(split, dataset.identity, tmp_path)
    (path,) = (tmp_path / "pairs").iterdir()
    assert kind.open(Tokens([[]]), dataset.identity, tmp_path).counts.any(), "not scanned"
    other = PairKind(9, 1, 6).open(split, dataset.identity, tmp_path)
    assert other.facts["too_long"] > 100, "a table of its own"
    raw = bytearray(path.read_bytes())
    raw[8] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="delete the file"):
        kind.open(split, dataset.identity, tmp_path).pieces(0, 0)


@pytest.mark.parametrize(
    ("separator", "found"), [(r"\t", 9), ("\t", 9), (r"\n", 10), ("|", 124), ("255", 255)]
)
def test_a_separator_is_an_id_or_a_text_of_one_token(separator, found):
    assert separator_id(byte_tokenizer(), separator, END) == found


def test_a_token_that_no_text_has_is_a_separator_too():
    """Others' tokenised corpora may hold it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<sep>", special=True)])
    assert separator_id(tokenizer, "<sep>", END) == 257


@pytest.mark.parametrize(
    ("separator", "said"),
    [
        ("=>", "'=>' is 2 tokens"),
        ("999", "'999' is no id of the tokenizer, which has 257"),
        ("9" * 5000, "is no id of the tokenizer"),
        ("\u00e9", "'\u00e9' is 2 tokens"),  # though a byte is written so in the vocabulary
        ("\udcff", "is 0 tokens"),  # not UTF-8
        (str(END), "ends each document"),
        (r"\t=", r"'\t=' is 2 tokens"),
        ("<|endoftext|>", "'<|endoftext|>' is the token that ends each document"),
    ],
)
def test_what_is_no_separator_is_one_sentence(separator, said):
    with pytest.raises(UserError) as error:
        separator_id(byte_tokenizer(), separator, END)
    assert error.value.where == "objective.pairs_separator"
    assert said in error.value.problem
