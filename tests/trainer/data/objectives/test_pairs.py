"""Prompts with answers: a row is source and target of one document, cut at its own separator."""

import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken

from forescale.data.bin_kinds import PairKind
from forescale.data.bins import Bins
from forescale.data.dataset import Damaged, Dataset
from forescale.data.feed import Feed, LostMember
from forescale.data.objective import IGNORED, NextToken
from forescale.data.objectives.pairs import Pairs, separator_id
from forescale.data.stream import StepShare, stream, validation_windows
from forescale.data.tokenizer import byte_tokenizer
from forescale.ground.errors import UserError
from forescale.models import ModelConfig, Transformer
from tests.reversed_words import NO_PAIRS, make_pairs
from tests.trainer.data.small_dataset import END, flip
from tests.trainer.data.test_stream import collect, make_feed

TAB, COLUMNS, SOURCE = 9, 14, 6


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return Dataset(make_pairs(tmp_path_factory.mktemp("pairs") / "words", NO_PAIRS))


def pairs_of(dataset, split="train", cache=None):
    kind = PairKind(TAB, SOURCE, COLUMNS - SOURCE)
    cache = cache or dataset.path.parent
    return Bins.open(kind, dataset.split(split), dataset.identity, cache)


def feed_of(dataset, substitute=False, cache=None) -> Feed:
    split, bins = dataset.split("train"), pairs_of(dataset, cache=cache)
    options = {"substitute": substitute, "objective": Pairs(COLUMNS, "\t", SOURCE)}
    return make_feed({"d": split}, COLUMNS, 3, 2, bins={"d": bins}, **options)


def texts_of(micro, split) -> list[tuple[bytes, bytes]]:
    """Source and target of each row that has any, after the rules of a row."""
    texts = []
    for tokens, targets, real in zip(micro.tokens, micro.targets, micro.padding_mask, strict=True):
        tokens, targets, real = tokens.numpy(), targets.numpy(), real.numpy()
        is_target = targets != IGNORED
        assert not tokens[~real].any()
        assert not is_target[:split].any()
        assert np.array_equal(is_target[split:], real[split:])
        if not real.any():
            continue
        assert real[split - 1], "the source ends at the split"
        inputs, expected = tokens[split:][real[split:]], targets[is_target]
        assert inputs[0] == TAB, "the decoder begins with the separator"
        assert inputs[1:].tolist() == expected[:-1].tolist()
        assert expected[-1] == END
        texts.append((bytes(tokens[:split][real[:split]].tolist()), bytes(expected[:-1].tolist())))
    return texts


def documents_of(dataset, split) -> list[bytes]:
    part, texts = dataset.split(split), []
    for shard, size in enumerate(part.shard_tokens):
        cuts = part.document_ends(shard, 0, size)
        texts += [bytes((t[:-1]).tolist()) for t in np.split(part.read(shard, 0, size), cuts)[:-1]]
    return texts


def wanted_of(dataset, split) -> list[tuple[bytes, bytes]]:
    parts = [tuple(d.split(b"\t", 1)) for d in documents_of(dataset, split) if b"\t" in d]
    return [p for p in parts if 0 < len(p[0]) <= SOURCE and len(p[1]) < COLUMNS - SOURCE]


def test_each_pair_comes_exactly_once_an_epoch(words):
    feed = feed_of(words)
    order = feed.mixture.orders[0]
    epochs = []
    for epoch in range(2):
        g = epoch * order.windows_per_epoch
        ((batch, micro, _),) = collect(feed, (0, 1), g, 1, order.windows_per_epoch, 1)
        epochs.append([text for m in micro for text in texts_of(m, SOURCE)])
        assert Counter(epochs[-1]) == Counter(wanted_of(words, "train"))
        assert batch.targets == order.targets_per_epoch
    assert epochs[0] != epochs[1], "in another order"


@pytest.mark.parametrize("limit", [None, 5])
def test_held_out_pairs_come_in_their_order_at_any_world_size(words, limit):
    bins, objective = pairs_of(words, "validation"), Pairs(COLUMNS, "\t", SOURCE)
    expected = wanted_of(words, "validation")
    if limit is not None:
        expected = [expected[i] for i in np.arange(limit) * len(expected) // limit]
    for world in (1, 3):
        arguments = (words.split("validation"), COLUMNS, 2)
        options = {"limit": limit, "objective": objective, "bins": bins, "world_size": world}
        micros = [
            m for r in range(world) for m in validation_windows(*arguments, rank=r, **options)
        ]
        micros.sort(key=lambda m: m.index)
        assert [text for m in micros for text in texts_of(m, SOURCE)] == expected


class Recording(NextToken):
    """Keeps how many arrays `examples` was given."""

    def __init__(self):
        self.given = []

    def examples(self, *arrays):
        self.given.append([cuts.shape for cuts in arrays[3:]])
        return super().examples(*arrays[:3])


def test_a_class_is_given_the_cuts_in_training_and_validation_alike(words):
    """With tables of pairs, whatever the class, one for each window; without, none."""
    for is_with in (True, False):
        feed = feed_of(words)
        objective = feed.objective = Recording()
        if not is_with:
            feed = make_feed({"d": words.split("train")}, COLUMNS, 3, 2, objective=objective)
        next(stream(feed, StepShare(2, 2), range(1), 0, workers=0))
        bins = pairs_of(words, "validation") if is_with else None
        arguments = (words.split("validation"), COLUMNS, 2)
        next(validation_windows(*arguments, objective=objective, bins=bins))
        assert objective.given == [[(2, 1)] * is_with] * 2


@pytest.mark.parametrize("encoder_layers", [0, 2])
@torch.no_grad()
def test_a_loss_is_that_of_the_target_alone_whatever_the_padding(words, encoder_layers):
    config = ModelConfig(num_layers=2, width=32, num_heads=2, encoder_layers=encoder_layers)
    config = replace(config, init_std=0.3, source_length=SOURCE if encoder_layers else None)
    model = Transformer(config.resolved(257, COLUMNS)).eval()
    (batch,) = stream(feed_of(words), StepShare(8, 8), range(1), 0, workers=0)
    (micro,) = batch.micro
    positional, named = micro.arguments(torch.device("cpu"))
    losses = model(*positional, **named)
    for loss, (source, target) in zip(losses, texts_of(micro, SOURCE), strict=True):
        config_of_length = replace(config, source_length=len(source) if encoder_layers else None)
        alone = Transformer(config_of_length.resolved(257, COLUMNS)).eval()
        alone.load_state_dict(model.state_dict())
        row = torch.tensor([[*source, TAB, *target]])
        logits = alone(row)[0, -len(target) - 1 :]
        expected = F.cross_entropy(logits, torch.tensor([*target, END]), reduction="sum")
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def damaged(words, tmp_path):
    """A copy with a flipped bit in a member, and the member; its pairs were found before."""
    pairs_of(words)
    shutil.copytree(words.path, tmp_path / "d")
    member = words.split("train").shard(1).members[1]
    flip(tmp_path / "d" / "train-000001.tar", member.tok["offset"])
    return Dataset(tmp_path / "d"), LostMember("d", 1, member.key)


def test_a_damaged_pair_is_replaced_by_a_whole_pair_of_as_many_targets(words, damaged):
    dataset, lost = damaged
    options_of_cache = {"cache": words.path.parent}
    share, steps = StepShare(8, 8), range(30)
    sound = list(stream(feed_of(words), share, steps, 0))
    with pytest.raises(Damaged, match=f"member {lost.member}"):
        list(stream(feed_of(dataset, **options_of_cache), share, steps, 0))
    rows = list(stream(feed_of(dataset, True, **options_of_cache), share, steps, 0))
    assert {member for b in rows for member in b.lost} == {lost}
    known, changed = wanted_of(words, "train"), 0
    for batch, before in zip(rows, sound, strict=True):
        assert batch.targets == before.targets
        texts, old = (texts_of(b.micro[0], SOURCE) for b in (batch, before))
        assert set(texts) <= set(known), "whole"
        assert [len(b) for _, b in texts] == [len(b) for _, b in old]
        changed += texts != old
    assert 0 < changed < 30
    again = list(stream(feed_of(dataset, True, **options_of_cache), share, steps, 0, workers=0))
    assert [b.window_hash for b in again] == [b.window_hash for b in rows]


def test_without_an_intact_pair_of_as_many_targets_it_is_said(words):
    split = words.split("train")
    shards = range(len(split.shard_tokens))
    lost = frozenset(LostMember("d", n, m.key) for n in shards for m in split.shard(n).members)
    with pytest.raises(UserError, match=r"no intact one has as many targets, \d"):
        feed_of(words, True).read([(0, 1)], lost)


@pytest.mark.parametrize(
    ("separator", "token"), [(r"\t", 9), ("\t", 9), (r"\n", 10), ("|", 124), ("255", 255)]
)
def test_a_separator_is_an_id_or_a_text_of_one_token(separator, token):
    assert separator_id(byte_tokenizer(), separator, END) == token


def test_a_token_that_no_text_has_is_a_separator_too():
    """Others' tokenised corpora may hold it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<sep>", special=True)])
    assert separator_id(tokenizer, "<sep>", END) == 257


@pytest.mark.parametrize(
    ("separator", "fact"),
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
def test_what_is_no_separator_is_one_sentence(separator, fact):
    with pytest.raises(UserError) as error:
        separator_id(byte_tokenizer(), separator, END)
    assert error.value.where == "objective.separator"
    assert fact in error.value.problem
