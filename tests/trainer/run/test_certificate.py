"""Certificates of rehearsals: which job they speak of, and what ends that."""

import pytest

from forescale.rehearsal.config import RehearseJob
from forescale.run import certificate
from forescale.run.certificate import about
from forescale.run.command import job_of
from tests.trainer import small_run

WORDS = ("plan.gpus=8", "train.global_batch=64")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def job(*words):
    return job_of(RehearseJob, [*WORDS, *words])


def certify(one, peak=5 << 30):
    return small_run.certify(one, one.gpus, peak)


def test_it_speaks_of_the_job_and_not_of_the_name_of_a_run():
    certify(job())
    other = job("run.name=other", "logging.every=7", "checkpoint.every='50 steps'")
    sentences, holds = about(other, other.gpus)
    assert holds
    assert "peak 5.0 GiB" in sentences[0]
    assert "rank 0, 7" in sentences[0]
    assert about(other.training, None)[1]  # whatever the GPUs


@pytest.mark.parametrize(
    "word", ["train.micro_batch=2", "engine=zero3", "plan.gpus=16", "train.compile=off"]
)
def test_a_changed_key_makes_it_stale_and_is_named(word):
    certify(job())
    changed = job(word)
    sentences, holds = about(changed, changed.gpus)
    assert not holds
    assert word.partition("=")[0] in sentences[0]


def test_of_several_the_nearest_is_compared():
    certify(job("optimizer.learning_rate=0.5", "train.micro_batch=2"), peak=9 << 30)
    certify(job("plan.gpus=16", "train.seed=5"), peak=7 << 30)
    certify(job("train.micro_batch=2"))
    (sentence,), _ = about(job(), job().gpus)
    assert "train.micro_batch 2 -> " in sentence
    assert "plan.gpus" not in sentence


def test_another_job_has_none(monkeypatch):
    certify(job())
    other = job("recipe=llama-1b")
    assert about(other, other.gpus) == ([], False)
    monkeypatch.setenv("FORESCALE_CACHE", "~nobody-at-all/cache")  # nor without a home directory
    assert about(job(), job().gpus) == ([], False)


def test_another_version_makes_it_stale(monkeypatch):
    certify(job())
    monkeypatch.setattr(certificate, "version", lambda package: "9.9")
    (sentence,), holds = about(job(), job().gpus)
    assert not holds
    assert "torch" in sentence
    assert "'9.9'" in sentence


def test_a_changed_class_of_the_users_own_makes_it_stale(tmp_path):
    file = tmp_path / "my_stale_model.py"
    file.write_text("class Model: ...\n")
    one = job("model._target_=my_stale_model.Model")
    certify(one)
    assert about(one, one.gpus)[1]
    file.write_text("class Model:\n    x = 1\n")
    (sentence,), holds = about(one, one.gpus)
    assert not holds
    assert "my_stale_model.Model" in sentence


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '{"time": "x"}', None])
def test_a_file_that_is_none_is_named_and_does_not_count(content):
    path = certify(job())
    if content is None:  # a flipped byte
        content = path.read_text().replace('"waits": 1', '"waits": 2')
    path.write_text(content)
    path.with_name("other.json").write_text(content)
    (sentence,), holds = about(job("train.seed=7"), job().gpus)
    assert not holds
    assert str(path.parent) in sentence
