"""What a dataset keeps of where its held-out documents come from."""

import json

import numpy as np
import pytest

from forescale.data.check import check
from forescale.data.dataset import ORIGINS, Dataset
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.tokens import kind_of
from forescale.data.text.files import Files
from forescale.ground.storage import read_table, write_table
from tests.trainer.data.prepare.test_builder import texts_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("src/a/b.PY", ".py"),
        ("books/x.txt.gz", ".txt"),
        ("web/part-7.jsonl@20480", ".jsonl"),
        ("web/part-7.parquet:12", ".parquet"),
        ("src/Makefile", ""),
        ("src.d/Makefile", ""),
        ("src/.gitignore", ""),
        ("src/a file. With words", ""),
    ],
)
def test_the_kind_of_a_document_is_the_suffix_of_its_file(name, kind):
    assert kind_of(name) == kind


@pytest.fixture
def built(tmp_path):
    """A dataset of two folders, whose texts say where they come from."""
    for folder, suffix, count in (("one", ".py", 40), ("one", ".md", 30), ("two", ".md", 30)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for i in range(count):
            (tmp_path / folder / f"{i}{suffix}").write_text(f"{folder} {suffix} {i}\n" * 5)
    config = BuildConfig(tokenizer="bytes", validation=0.4, shard_tokens=1000, member_tokens=300)
    source = Files([tmp_path / "one", tmp_path / "two"])
    return build_dataset(source, tmp_path / "data", config)


def test_each_held_out_document_has_its_input_and_its_kind(built):
    dataset = Dataset(built)
    origins, texts = dataset.origins, texts_of(built, "validation")
    assert len(dataset.split("validation").shard_tokens) > 1
    assert len(texts) == len(origins["source"]) == len(origins["kind"]) > 20
    for text, source, kind in zip(texts, origins["source"], origins["kind"], strict=True):
        assert text.split(" ")[:2] == [origins["sources"][source], origins["kinds"][kind]]
    assert len(np.unique(origins["source"])) == len(np.unique(origins["kind"])) == 2
    assert check(built) == []


def test_it_is_no_part_of_the_identity_and_need_not_be_there(built):
    identity, table = Dataset(built).identity, read_table(built)
    del table[ORIGINS]
    (built / ORIGINS).unlink()
    write_table(built, table)
    assert Dataset(built).identity == identity
    assert Dataset(built).origins is None
    assert check(built) == []


def test_a_changed_file_is_a_fault(built):
    origins = json.loads((built / ORIGINS).read_text())
    origins["kind"][0] = 1 - origins["kind"][0]
    (built / ORIGINS).write_text(json.dumps(origins))
    assert any(ORIGINS in fault for fault in check(built))
