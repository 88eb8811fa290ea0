"""What the verbs do with a run of pairs: counts, scores, and what they say of other documents."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from forescale import open_dataset, open_run
from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.run import data_use
from forescale.run.feed import feed_of, targets_of_a_window
from forescale.run.start import open_sources, settle
from tests.reversed_words import KIND, NO_PAIRS, make_pairs
from tests.trainer.data.small_dataset import write_dataset
from tests.trainer.small_run import BATCH, STEPS, make_job, make_run

MODEL = ["model.num_layers=1", "model.width=32", "model.num_heads=2", "model.encoder_layers=1"]
SHAPE = ["train.sequence_length=14", "objective.source=6"]
LEFT_OUT = r"(\d+) of (\d+) documents are left out, because they are no pairs: "


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("data") / "words", NO_PAIRS)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return make_run(data, tmp_path_factory.mktemp("runs"), "pairs", *MODEL, *KIND, *SHAPE)


def pairs_in(dataset, name) -> list[tuple[bytes, bytes]]:
    """Source and target of each document of a split that is a pair of this length."""
    split, pairs = dataset.split(name), []
    for shard, size in enumerate(split.shard_tokens):
        raw = bytes(t % 256 for t in split.read(shard, 0, size).tolist())  # 256 ends a document
        parts = [document.split(b"\t", 1) for document in raw.split(b"\0")[:-1]]
        pairs += [tuple(p) for p in parts if len(p) == 2 and 0 < len(p[0]) <= 6 and len(p[1]) < 8]
    return pairs


@torch.no_grad()
def test_eval_scores_each_target_of_the_split_with_its_end(run, data, forescale):
    model, pairs = open_run(run.path).model(), pairs_in(open_dataset(data), "validation")
    nats = targets = size = 0
    for source, target in pairs:
        row, expected = [[0] * (6 - len(source)) + [*source, 9, *target]], [*target, 256]
        mask = torch.arange(len(row[0])) >= 6 - len(source)
        logits = model(torch.tensor(row), padding_mask_BL=mask[None])[0]
        nats += F.cross_entropy(logits, torch.tensor(expected), reduction="sum").item()
        targets, size = targets + len(expected), size + len(target)
    out = forescale.prints("eval", run.path, "micro_batch=3")
    assert re.search(rf"tokens of answers +{targets}\n", out)
    assert re.search(rf"bytes +{size}\n", out)
    assert float(re.search(r"loss +([\d.]+)", out)[1]) == pytest.approx(nats / targets, abs=1e-4)
    bits = float(re.search(r"bits per byte +([\d.]+)", out)[1])
    assert bits == pytest.approx(nats / math.log(2) / size, abs=1e-4)
    out = forescale.prints("eval", run.path, "windows=3", "split=train")
    assert re.search("Note: " + LEFT_OUT, out)


def test_check_replays_the_pairs_and_names_what_was_left_out(run, forescale):
    out = forescale.prints("check", run.path)
    assert "each step's tokens are those in the shards" in out
    assert re.search("Note: data: " + LEFT_OUT, out)


def test_plan_counts_pairs_and_keeps_no_table(data, tmp_path, forescale):
    cache = tmp_path / "cache"
    words = [f"data.path={data}", f"data.cache={cache}", *MODEL, *KIND, *SHAPE]
    words += ["train.steps=100", "train.global_batch=8"]
    plan = json.loads(forescale.prints("plan", *words, "--json"))
    assert not cache.exists()
    job = compose(TrainJob, words)
    sources = open_sources(job.data)
    feed = feed_of(settle(job, sources), sources)
    pairs = feed.mixture.orders[0].windows_per_epoch
    assert plan["sources"][0]["epochs"] == pytest.approx(100 * 8 / pairs)
    train = pairs_in(open_dataset(data), "train")
    size = sum(len(source) + len(target) + 2 for source, target in train)  # separator and end
    assert plan["sources"][0]["read"] == pytest.approx(100 * 8 / pairs * size)
    assert plan["sources"][0]["tokens"] > size
    assert plan["evaluation"]["at_end"]["windows"] == len(
        pairs_in(open_dataset(data), "validation")
    )
    (note,) = [n for n in plan["notes"] if "left out" in n]
    left, documents = map(int, re.search(LEFT_OUT, note).groups())
    assert documents - left == pairs
    assert cache.exists()
    assert json.loads(forescale("plan", *words, "--json")[1])["notes"] == plan["notes"]


@pytest.mark.parametrize(
    ("words", "unit"), [([*MODEL, *KIND, *SHAPE], "columns"), ([*MODEL[:3], SHAPE[0]], "tokens")]
)
def test_plan_names_columns_what_are_no_tokens_of_the_data(data, forescale, words, unit):
    """Rows of pairs hold padding, which is not read from the data."""
    options = [f"data.path={data}", *words, "train.steps=100", "train.global_batch=8"]
    out = forescale.prints("plan", *options)
    assert f"100 steps of 112 {unit}: 8 windows of 14" in out
    assert f"11.2 K {unit} in total" in out
    assert re.search(r"data: [\d.]+ K tokens, [\d.]+ K tokens read, [\d.]+ epochs", out)


def test_plan_estimates_what_takes_long_to_count(data, tmp_path, forescale, monkeypatch):
    monkeypatch.setattr(data_use, "_SCANNED", 0)
    words = [f"data.path={data}", f"data.cache={tmp_path}", *MODEL, *KIND, *SHAPE]
    code, printed, _ = forescale("plan", *words, "train.steps=100", "--json")
    plan = json.loads(printed)
    assert code == 0
    assert any("rows of the data are not counted yet" in note for note in plan["notes"])
    assert plan["evaluation"]["at_end"] is None
    tokens = 100 * plan["config"]["train"]["global_batch"] * 14
    assert plan["sources"][0]["epochs"] == pytest.approx(
        tokens / open_dataset(data).split("train").num_tokens
    )


def test_each_pair_of_a_mixture_is_read_as_often(data, tmp_path):
    """Whatever their lengths: the default shares are numbers of pairs."""
    other = make_pairs(tmp_path / "other", tuple(f"{'a' * i}\tb" for i in (5, 6)))
    job = make_job(data, tmp_path, "m", *MODEL, *KIND, *SHAPE, "data.path=null")
    job = replace(job, data=replace(job.data, sources={"one": str(data), "two": str(other)}))
    sources = open_sources(job.data)
    feed = feed_of(settle(job, sources), sources)
    numbers = [order.windows_per_epoch for order in feed.mixture.orders]
    assert numbers[0] != numbers[1]
    read = feed.mixture.samples(1024)  # a block, where shares are exact
    assert read.tolist() == pytest.approx([1024 * n / sum(numbers) for n in numbers], abs=1)


def test_flops_of_the_rows_are_those_of_whole_rows(run, data):
    """Their price is of a target, of which rows have few."""
    feed = feed_of(open_run(run.path).config, open_sources(open_run(run.path).config.data))
    mean = targets_of_a_window(open_run(run.path).config, feed)
    windows = STEPS * BATCH
    assert mean * windows == pytest.approx(feed.targets([(0, windows)]).sum())
    assert 1 < mean < 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective.separator=z"], r"none of its \d+ documents has the separator 'z'"),
        (["objective.separator=zz"], "'zz' is 2 tokens in this dataset's tokenizer"),
        (["train.sequence_length=2", "objective.source=1"], r"has no pair: .* longer than"),
    ],
)
def test_data_without_a_pair_is_one_sentence(data, tmp_path, forescale, words, message):
    options = [f"data.path={data}", f"run.root={tmp_path}", *MODEL, *KIND, *SHAPE, *words]
    for verb in (["train", "none"], ["plan"]):
        code, out, err = forescale(*verb, *options, "train.steps=10")
        assert code == 2
        assert re.search(message, err + out), err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("tab", [r"\t", '"\t"'])
def test_a_separator_that_the_only_document_lacks_is_shown_as_one_types_it(
    tmp_path, forescale, tab
):
    path = write_dataset(tmp_path / "d", [[3]])
    words = [f"data.path={path}", *MODEL, *KIND, *SHAPE, f"objective.separator={tab}"]
    code, out, err = forescale("plan", *words)
    assert code == 2
    assert r"its only document lacks the separator '\t' (token 9)" in out + err


def test_the_columns_of_a_source_that_are_not_the_objective_s_are_refused(data, forescale):
    """The advice is no objective that the job has."""
    words = ["plan", f"data.path={data}", *MODEL, *KIND, *SHAPE, "model.source_length=5"]
    err = forescale.refuses(*words)
    problem = "5 is given, and the source of objective pairs has 6 columns; leave it out"
    assert f"model.source_length: {problem}" in err
    assert "objective=" not in err
