"""New documents are judged against datasets that were built before; what these hold stays there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from forescale.data.check import check
from forescale.data.curate.curation import Curation
from forescale.data.curate.duplicates import Duplicates
from forescale.data.curate.earlier import chain_faults
from forescale.data.curate.substrings import Substrings
from forescale.data.dataset import Dataset, Sources
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.sample import documents
from forescale.data.text.files import Files
from forescale.monitor.report.curation import page

CONFIG = BuildConfig(
    tokenizer="bytes", validation=0.1, shard_tokens=20_000, member_tokens=5_000, parquet=True
)
BUILD = """
import sys
from tests.trainer.data.curate.test_earlier import built
built(*sys.argv[1:])
"""


def write(path, texts, url=""):
    rows = ({"text": text, "url": url.format(i)} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def built(rows, output, *against, unit_bytes=5_000, stays="first", **options):
    near, passages = Duplicates(stays=stays), Substrings(20, 5)
    curation = Curation(near_duplicates=near, repeated_passages=passages, against=list(against))
    curation = options.pop("curation", curation)
    build_dataset(
        Files([rows], unit_bytes=unit_bytes), output, CONFIG, curation=curation, **options
    )
    return Dataset(output)


def texts_of(dataset):
    both = [documents(dataset, split) for split in ("train", "validation")]
    return sorted(text.decode() for texts in both for text in texts)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The folder with `web`, of 40 texts, and the rows of what comes later; the texts that `web`
    has, those that are fresh, and a fresh one of which 40 words are in `web`."""
    folder = tmp_path_factory.mktemp("earlier")
    letters = np.random.default_rng(3).integers(97, 123, (70, 120, 6), np.uint8)
    texts = [" ".join(bytes(word).decode() for word in rows) for rows in letters]
    old, fresh = texts[:40], texts[40:]
    built(write(folder / "old.jsonl", old), folder / "web")
    near = [f"{text} with a longer end" for text in old[:10]]
    passage = "begins anew " + " ".join(old[30].split()[40:80]) + " and ends"
    rows = [*near, *old[10:15], *fresh, f"{fresh[0]} again", fresh[1], passage]
    return write(folder / "new.jsonl", rows), folder, old, fresh


@pytest.mark.parametrize("stays", ["first", "longest"])
def test_what_an_earlier_dataset_holds_goes_and_is_counted(planted, tmp_path, stays):
    rows, folder, old, fresh = planted
    dataset = built(rows, tmp_path / "out", str(folder / "web"), stays=stays)
    first = fresh[0] if stays == "first" else f"{fresh[0]} again"
    assert texts_of(dataset) == sorted([first, *fresh[1:], "begins anew and ends"])
    steps = dataset.curation["steps"]
    assert {reason: pair[0] for reason, pair in steps["against"]["dropped"].items()} == {
        "is in web": 15
    }
    assert steps["against"]["read"][0] == 48
    assert steps["near_duplicates"]["read"][0] == 33
    assert steps["near_duplicates"]["dropped"]["near-duplicate"][0] == 2
    assert steps["repeated_passages"]["changed"][0] == 1
    assert dataset.manifest["report"]["left_out"]["is in web"]["count"] == 15
    for _, _, dropped, stayed in dataset.curation["samples"]["against: is in web"]:
        assert stayed in {text[: len(stayed)] for text in old}
        assert dropped.startswith(stayed[:700])
    assert "is in web" in page(dataset)


def test_without_near_duplicates_only_equal_texts_go(planted, tmp_path):
    rows, folder, old, fresh = planted
    curation = Curation(against=[str(folder / "web")])
    dataset = built(rows, tmp_path / "out", curation=curation)
    remaining = texts_of(dataset)
    assert len(remaining) == 48 - 5 - 1
    left_out = dataset.manifest["report"]["left_out"]
    assert {reason: of["count"] for reason, of in left_out.items()} == {
        "duplicate": 1, "is in web": 5,
    }  # fmt: skip
    assert not {*old} & {*remaining}
    assert {*fresh} < {*remaining}


def test_the_bytes_are_those_of_one_process_for_several_and_after_kills(planted, tmp_path):
    rows, folder, *_ = planted
    against, (one, other) = str(folder / "web"), (tmp_path / "one", tmp_path / "other")
    built(rows, one, against)

    def started():
        command = [sys.executable, "-c", BUILD, rows, other, against]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return [subprocess.Popen(command, env=env) for _ in range(2)]

    processes, signed = started(), tmp_path / ".other.building" / "signatures"
    while not (signed.is_dir() and len([*signed.iterdir()]) > 2):
        time.sleep(0.005)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not other.exists()
    for process in started():
        assert process.wait(60) == 0
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


def test_check_says_that_an_earlier_dataset_is_gone_or_another_one(planted, tmp_path):
    rows, folder, _, fresh = planted
    shutil.copytree(folder / "web", tmp_path / "web")
    dataset = built(rows, tmp_path / "out", str(tmp_path / "web"))
    (chained,) = dataset.manifest["build"]["curation"]["against"]
    assert chained == {"name": "web", "manifest": Dataset(folder / "web").manifest_hash}
    assert check(tmp_path / "out") == []
    assert [*chain_faults(dataset)] == []
    assert Sources({"out": dataset}).describe()["out"]["manifest"] == dataset.manifest_hash
    shutil.rmtree(tmp_path / "web")
    ((sentence, is_other),) = chain_faults(dataset)
    assert str(tmp_path / "web") in sentence
    assert not is_other
    built(write(tmp_path / "rows.jsonl", fresh), tmp_path / "web")
    ((sentence, is_other),) = chain_faults(dataset)
    assert "is not the dataset any more" in sentence
    assert is_other
    with pytest.raises(Exception, match="different curation"):
        built(rows, tmp_path / "out", str(tmp_path / "web"))
