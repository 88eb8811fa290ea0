"""Inputs of all kinds as units of work: they depend only on the files, and together give all
documents."""

import gzip
import io
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forescale.data.text.documents import Policy, ReadingReport
from forescale.data.text.files import Files
from tests.trainer.data.read_files import lines, read


@pytest.fixture
def corpus(tmp_path):
    """Every kind of file, with faults to report."""
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(40):
        (root / f"note {i:02d}.txt").write_text(f"note {i} " * (i % 5))
    rows = lines(*({"text": f"row {i} " * (i % 9)} for i in range(200)))
    (root / "rows.jsonl").write_bytes(rows)
    (root / "rows.jsonl.gz").write_bytes(gzip.compress(rows.replace(b"row", b"packed row")))
    table = pa.table({"text": [f"cell {i}" if i % 10 else None for i in range(100)]})
    pq.write_table(table, root / "table.parquet", row_group_size=20)
    with tarfile.open(root / "web.tar", "w") as f:
        for i in range(20):
            entry = tarfile.TarInfo(f"{i:03d}.txt")
            entry.size = 5
            f.addfile(entry, io.BytesIO(b"%05d" % i))
    (root / "photo.jpg").write_bytes(b"jpg")
    return root


def test_units_are_fixed_by_the_files(corpus):
    units = Files([corpus], unit_bytes=1000).units()
    assert units == Files([corpus], unit_bytes=1000).units()
    assert next(unit.label for unit in units if "note" in unit.label).endswith("more")
    assert {"corpus/rows.jsonl (part 1 of 9)", "corpus/rows.jsonl.gz", "corpus/web.tar"} <= {
        unit.label for unit in units
    }


def test_documents_and_report_are_the_same_for_units_of_any_size(corpus):
    whole = read(corpus, unit_bytes=1 << 30)
    assert len(whole[0]) == 32 + 177 * 2 + 90 + 20
    assert whole[1].counts == {"empty": 8 + 23 * 2, "no text under 'text'": 10, "other suffix": 1}
    for unit_bytes in (1, 100, 3000):
        assert read(corpus, unit_bytes=unit_bytes) == whole


def test_units_read_by_other_processes_in_any_order_give_the_same(corpus):
    files = Files([corpus], unit_bytes=700)
    whole, report = read(corpus)
    other = pickle.loads(pickle.dumps(files))
    documents = {}
    for unit in reversed(pickle.loads(pickle.dumps(files.units()))):
        part = ReadingReport()
        documents[unit] = [(d.name, d.text) for d in other.read(unit, part)], part
    merged = ReadingReport()
    for unit in files.units():
        merged.merge(documents[unit][1])
    assert [d for unit in files.units() for d in documents[unit][0]] == whole
    assert merged.as_dict() == report.as_dict()


def test_a_unit_holds_files_of_one_input(corpus):
    files = Files([corpus / "note 0*.txt", corpus / "note 1*.txt"])
    assert [unit.label for unit in files.units()] == [
        "note 00.txt and 9 more",
        "note 10.txt and 9 more",
    ]
    assert [unit.source for unit in files.units()] == [0, 1]
    assert files.sources == ["note 0*.txt", "note 1*.txt"]


def test_small_files_are_grouped_up_to_the_size_of_a_unit(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * 30)
    (tmp_path / "5.txt").write_bytes(b"x" * 300)
    sizes = [unit.size for unit in Files([tmp_path], unit_bytes=100).units()]
    assert sizes == [90, 60, 300, 90, 30]


def test_the_description_distinguishes_requests(corpus):
    description = Files([corpus]).describe()
    assert description["files"] == 44
    assert description["bytes"] == sum(
        p.stat().st_size for p in corpus.iterdir() if p.suffix != ".jpg"
    )
    assert Files([corpus], text_key="body").describe() != description
    assert Files([corpus], policy=Policy(undecodable="replace")).describe() != description


def test_long_documents_of_every_kind(corpus):
    policy = Policy(long="cut", max_document_bytes=4)
    documents, report = read(corpus, policy=policy)
    assert {len(text) for _, text in documents} == {4}
    assert report.counts["long, cut"] == len(documents)
