"""What else held-out text and random tokens tell: each number against a plain loop."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from forescale import open_dataset, open_run
from forescale.inference.details import (
    InContextSums,
    WindowLosses,
    induction,
    measure,
    window_losses,
)
from forescale.inference.scoring import score
from tests.trainer.small_run import LENGTH, make_run


@pytest.fixture(scope="module")
def read(trained):
    view = open_run(trained.path)
    return view, view.model(), open_dataset(view.identity["dataset"]["path"])


def losses_of(read, **options):
    _, model, dataset = read
    return [*window_losses(model, dataset.split("validation"), LENGTH, **options)]


@pytest.mark.parametrize("documents", [False, True])
def test_the_losses_of_tokens_add_up_to_the_score(read, documents):
    _, model, dataset = read
    losses = losses_of(read, documents=documents, windows=9)
    options = {"sequence_length": LENGTH, "micro_batch": 4, "windows": 9, "documents": documents}
    whole = score(model, dataset, "validation", **options)
    assert sum(len(w.nats) for w in losses) == whole.targets
    nats = math.fsum(x for w in losses for x in w.nats)
    assert nats == pytest.approx(whole.loss * whole.targets, rel=1e-6)


def test_each_token_belongs_to_its_document_and_its_place(read):
    _, _, dataset = read
    part = dataset.split("validation")
    assert len(part.shard_tokens) == 1
    ids = part.read(0, 0, part.num_tokens)
    number = np.cumsum(ids == dataset.end_of_text) - (ids == dataset.end_of_text)
    plain, masked = losses_of(read), losses_of(read, documents=True)
    assert np.concatenate([w.ids for w in plain]).tolist() == ids[1:].tolist()
    assert np.concatenate([w.document for w in plain]).tolist() == number[1:].tolist()
    assert plain[0].context.tolist() == [*range(1, LENGTH + 1)]
    for window in masked:  # the second token of a document is predicted from its first alone
        begins = np.flatnonzero(window.ids[:-2] == dataset.end_of_text) + 2
        assert (window.context[begins] == 1).all()
        assert (window.context[begins - 1] > 1).all()


def test_bits_per_byte_of_the_parts_add_up_to_that_of_the_whole(read):
    view, model, dataset = read
    details = measure(view.config, model, dataset, "validation")
    whole = score(model, dataset, "validation", sequence_length=LENGTH, micro_batch=4)
    (part,) = details.parts["kind"]
    assert (part.name, part.bytes) == (".py", whole.bytes)
    assert part.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)
    assert part.documents == dataset.split("validation").num_documents
    assert 0 < part.stderr < part.bits_per_byte
    assert not measure(view.config, model, dataset, "train").parts


def test_the_in_context_score_compares_pairs_of_one_context():
    sums, rng = InContextSums(600), np.random.default_rng(0)
    late, early = [], []
    for size in (600, 520, 400):
        nats, context = rng.random(size), np.arange(1, size + 1)
        sums.add(WindowLosses(context, nats, context, context))
        if size >= 500:  # the loss after 500 tokens is that of the 500th target
            late.append(nats[499])
            early.append(nats[49])
    # Two documents, of which the second is long enough.
    context = np.r_[1:101, 1:501]
    nats = rng.random(600)
    sums.add(WindowLosses(context, nats, context, context))
    late.append(nats[599])
    early.append(nats[149])
    in_context = sums.score()
    change = np.array(late) - np.array(early)
    assert (in_context.late, in_context.early, in_context.pairs) == (500, 50, 3)
    assert in_context.score == pytest.approx(change.mean())
    assert in_context.stderr == pytest.approx(change.std(ddof=1) / math.sqrt(3))
    assert in_context.late_loss - in_context.early_loss == pytest.approx(in_context.score)


def test_shorter_windows_have_places_of_their_own(read):
    scores = InContextSums(LENGTH)
    [scores.add(window) for window in losses_of(read)]
    whole = scores.score()
    assert (whole.late, whole.early) == (32, 3)
    assert whole.pairs == sum(len(w.nats) == LENGTH for w in losses_of(read))
    assert InContextSums(9).score().pairs == 0
    assert math.isnan(InContextSums(9).score().score)


class Copier(nn.Module):
    """Writes what followed the last earlier copy of a token; else nothing is likelier. logit: of
    what it writes; 0: it finds all tokens equally likely."""

    def __init__(self, vocab_size, logit=20.0):
        super().__init__()
        self.vocab_size, self.logit = vocab_size, logit
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for row, ids in zip(logits, tokens.tolist(), strict=True):
            for i, token in enumerate(ids):
                if token in ids[:i]:
                    row[i, ids[i - 1 - ids[:i][::-1].index(token) + 1]] = self.logit
        return logits


def test_who_copies_has_a_low_loss_the_second_time():
    scores = induction(Copier(10_000), 10_000, 0, 512)
    assert (scores.tokens, scores.rows) == (32, 32)
    assert scores.first == pytest.approx(math.log(10_000), rel=0.02)
    # Of 32 tokens all but the first, which follows the last one of the first copy.
    assert scores.share == pytest.approx(31 / 32, abs=0.01)
    assert scores.score == pytest.approx(scores.again - scores.first)
    assert scores.score < -8
    assert 0 < scores.score_stderr < 0.2


def test_who_knows_nothing_has_no_score():
    scores = induction(Copier(100, 0.0), 100, 0, 21)
    assert scores.tokens == 10
    assert scores.score == pytest.approx(0, abs=1e-9)
    assert scores.share < 0.1


def test_eval_prints_them_and_json_has_them_all(trained, forescale):
    out = forescale.prints("eval", trained.path, "windows=6", "--details")
    assert "Bits per byte by file type:" in out
    assert "In-context-learning score: " in out
    assert "the loss after 32 tokens" in out
    assert "Induction score: " in out
    code, out, _ = forescale("eval", trained.path, "windows=6", "--details", "--json")
    score_row, kind, source, context, copied = map(json.loads, out.splitlines())
    assert (code, score_row["windows"], score_row["step"]) == (0, 6, 8)
    assert (kind["of"], kind["name"], source["of"]) == ("kind", ".py", "source")
    assert kind["bits_per_byte"] == pytest.approx(score_row["bits_per_byte"], rel=1e-5)
    assert (context["of"], context["late"]) == ("in_context", 32)
    assert (copied["of"], copied["rows"], copied["step"]) == ("induction", 32, 8)


def test_details_of_a_model_that_continues_no_text_are_refused(small_data, tmp_path, forescale):
    masked = ("objective=masked", "model.causal=false", "model.num_layers=1")
    run = make_run(small_data, tmp_path / "runs", "masked", *masked, "model.width=32")
    err = forescale.refuses("eval", run.path, "--details")
    assert "details: are of each next token of a text" in err
    err = forescale.refuses("eval", run.path, "--details", "abilities=[copy]")
    assert "details: are of losses, instead of which abilities or tasks are measured" in err
