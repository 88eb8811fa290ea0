"""From a job and its data to what is read: shares, stages, limits, and what is refused."""

from pathlib import Path

import pytest

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.data.dataset import Sources
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.text.files import Files
from forescale.ground.errors import UserError
from forescale.run.feed import epochs, feed_of, notes
from forescale.run.start import open_sources, settle
from tests.trainer.data.small_dataset import write_dataset

L, BATCH = 32, 4


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """A large and a small source: 6,400 and 1,600 tokens."""
    folder = tmp_path_factory.mktemp("sources")
    shards = {"web": [[40] * 40] * 4, "code": [[40] * 40]}
    return {name: write_dataset(folder / name, rows) for name, rows in shards.items()}


def opened(paths: dict[str, Path], *overrides: str, steps: int = 100):
    named = ", ".join(f"{name}: {path}" for name, path in paths.items())
    job = compose(
        TrainJob,
        [
            "data=mixture",
            f"data.sources={{{named}}}",
            f"train.steps={steps}",
            "train.tokens=null",
            f"train.sequence_length={L}",
            f"train.global_batch={BATCH}",
            "train.micro_batch=2",
            "schedule.warmup=1",
            *overrides,
        ],
    )
    sources = open_sources(job.data)
    return settle(job, sources), sources


def test_without_weights_every_source_is_read_equally_often(paths):
    job, sources = opened(paths, steps=2000)
    assert job.data.weights == {
        "web": 6400,
        "code": 1600,
    }  # frozen: data that grows changes nothing
    times = epochs(job, feed_of(job, sources))
    assert times["web"] == pytest.approx(times["code"], rel=0.01)


def test_shares_are_exact_in_each_stage(paths):
    stage = f"data.stages=[{{from: {512 * L} tokens, weights: {{code: 1}}}}]"
    job, sources = opened(paths, "data.weights={web: 0.75, code: 0.25}", stage, steps=512)
    mixture = feed_of(job, sources).mixture
    assert mixture.samples(512).tolist() == [384, 128]
    assert (mixture.samples(2048) - mixture.samples(512)).tolist() == [0, 1536]


def test_sources_of_the_same_shards_do_not_come_in_lockstep(paths):
    twins = {"one": paths["web"], "two": paths["web"]}
    job, sources = opened(twins, "data.weights={one: 1, two: 1}", steps=64)
    places = feed_of(job, sources).mixture.places(0, 200)
    first, second = (places.start[places.source == s][:50].tolist() for s in (0, 1))
    assert first != second
    assert sorted(sources.names) == ["one", "two"]


def test_a_limit_on_epochs_is_held_before_anything_starts(paths):
    job, sources = opened(paths, "data.weights={web: 1, code: 1}", "data.max_epochs={code: 4}")
    with pytest.raises(UserError, match=r"max_epochs\.code: the run reads code 4\.00 times|") as e:
        feed_of(job, sources)
    assert "the limit is 4" in str(e.value)
    within, sources = opened(
        paths, "data.weights={web: 1, code: 1}", "data.max_epochs={code: 4}", steps=90
    )
    assert epochs(within, feed_of(within, sources))["code"] <= 4


def test_many_epochs_are_said(paths):
    job, sources = opened(paths, "data.weights={web: 1, code: 9}")
    assert "code is read" in notes(job, feed_of(job, sources))[0]
    job, sources = opened(paths, steps=10)
    assert notes(job, feed_of(job, sources)) == []


def test_a_source_without_a_window_is_named(paths, tmp_path):
    hollow = write_dataset(tmp_path / "hollow", [[1]])
    job, sources = opened({**paths, "hollow": hollow})
    with pytest.raises(UserError, match="hollow: has no shard with two tokens"):
        feed_of(job, sources)


def test_one_tokenizer_for_all(paths, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(50):
        (folder / f"{i}.txt").write_text(f"text number {i}, and so on and on")
    other = build_dataset(Files([folder]), tmp_path / "other", BuildConfig(vocab_size=300))
    with pytest.raises(UserError, match=r"data\.sources\.other: .* has a different tokenizer"):
        opened({**paths, "other": other})


def test_a_lone_source_is_not_renamed(paths):
    """Its own identity, so a run on it and a run on data.path are one and the same data."""
    _, sources = opened({"web": paths["web"]})
    assert isinstance(sources, Sources)
    assert sources.identity == sources.first.identity
    assert not sources.is_mixture
