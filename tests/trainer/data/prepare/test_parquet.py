"""The text of a dataset as tables: the documents of its shards, with what a curation found out."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pyarrow.parquet as pq

from forescale.data.check import check
from forescale.data.curate import curation
from forescale.data.curate.curation import Curation
from forescale.data.curate.steps.language import Language
from forescale.data.dataset import Dataset
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.parquet import table_faults
from forescale.data.prepare.sample import documents
from forescale.data.text.files import Files
from tests.trainer.data.curate.test_earlier import write

CONFIG = BuildConfig(tokenizer="bytes", validation=0.1, parquet=True)


def test_the_tables_have_the_documents_of_the_shards_and_what_steps_found_out(tmp_path):
    english, german = "This is the text of number {} in the list", "Das ist der Text Nummer {}"
    texts = [(german if i % 3 else english).format(i % 50) for i in range(60)]
    rows = write(tmp_path / "rows.jsonl", texts, url="https://www.a.org/{}")
    languages = Curation([Language(languages=("en", "de"), least_probability=0.0)])
    source = Files([rows], unit_bytes=1_000, url_key="url")
    dataset = Dataset(build_dataset(source, tmp_path / "out", CONFIG, curation=languages))
    table = pq.read_table([*(tmp_path / "out").glob("text-*.parquet")]).to_pylist()
    for split in ("train", "validation"):
        text = [row["text"] for row in table if row["split"] == split]
        assert sorted(text) == sorted(t.decode() for t in documents(dataset, split))
    first = min(table, key=lambda row: int(row["id"].partition("@")[2]))
    assert 0 < first.pop("language_probability") <= 1
    first.pop("split")
    assert first == {
        "id": "rows.jsonl@0",
        "source": "rows.jsonl",
        "url": "https://www.a.org/0",
        "domain": "a.org",
        "bytes": len(texts[0]),
        "text": texts[0],
        "language": "en",
    }
    two = build_dataset(source, tmp_path / "two", CONFIG, workers=2, curation=languages)
    for path in dataset.path.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()
    bare = build_dataset(
        source, tmp_path / "bare", replace(CONFIG, parquet=False), curation=languages
    )
    assert Dataset(bare).identity == dataset.identity
    assert "parquet" not in Dataset(bare).manifest["build"]


def test_attributes_of_any_kind_become_columns(tmp_path, monkeypatch):
    values = [True, 3, None, 0.5, "many"]

    @dataclass(frozen=True)
    class Mark:
        VERSION: ClassVar[int] = 1
        SOURCE: ClassVar[str] = "this test"

        def __call__(self, draft):
            place = int(draft.text.split()[1])
            draft.attributes["text"] = values[place % 5]
            draft.attributes["number"] = values[place % 4]

    monkeypatch.setattr(curation, "step_classes", lambda: {"mark": Mark})
    rows = write(tmp_path / "rows.jsonl", [f"text {i}" for i in range(40)])
    path = build_dataset(Files([rows]), tmp_path / "out", CONFIG, curation=Curation([Mark()]))
    table = pq.read_table(path / "text-000000.parquet").slice(0, 5).to_pylist()
    assert [row["text_"] for row in table] == ["True", "3", None, "0.5", "many"]
    assert [row["number"] for row in table] == [1.0, 3.0, None, 0.5, 1.0]


def test_check_counts_the_rows(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [f"text {i}" for i in range(60)])
    path = build_dataset(Files([rows]), tmp_path / "out", CONFIG)
    assert check(path) == []
    manifest = copy.deepcopy(Dataset(path).manifest)
    assert [*table_faults(path, manifest)] == []
    manifest["report"]["text"]["files"][0]["train"] += 1
    fault, of_all = table_faults(path, manifest)
    assert "has 60 rows, the manifest says 61" in fault
    assert "documents of train" in of_all
    (table,) = path.glob("*.parquet")
    table.write_bytes(table.read_bytes()[:-9])
    assert any(table.name in sentence for sentence in check(path))
