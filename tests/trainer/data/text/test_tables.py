"""Parquet files and Hugging Face data sets: every row once, however the table is cut."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forescale.data.text import opening
from forescale.data.text.documents import Policy, ReadingReport
from forescale.data.text.files import Files
from tests.trainer.data.read_files import expect_refused, lines, read
from tests.trainer.data.small_dataset import flip

TEXTS = [f"row {i} " * (i % 7 + 1) for i in range(100)]


def parquet(path, texts=TEXTS, group=10, kind=None, **columns):
    table = pa.table(
        {"id": range(len(texts)), "text": pa.array(texts, kind or pa.string())} | columns
    )
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.string_view()])
def test_rows_are_documents(tmp_path, kind):
    path = parquet(tmp_path / "a.parquet", kind=kind)
    documents, report = read(path)
    assert documents == [(f"a.parquet:{i}", text.encode()) for i, text in enumerate(TEXTS)]
    assert report.counts == {}


def test_categories_are_text_too(tmp_path):
    column = pa.array(TEXTS * 3).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert [text.decode() for _, text in read(tmp_path / "a.parquet")[0]] == TEXTS * 3


def test_units_are_row_groups_and_change_nothing(tmp_path):
    path = parquet(tmp_path / "a.parquet")
    whole = read(path)
    for unit_bytes in (1, 700, 10**9):
        assert read(path, unit_bytes=unit_bytes) == whole
    files = Files([path], unit_bytes=1)
    units = files.units()
    assert [unit.label for unit in units][:2] == [
        "a.parquet (part 1 of 10)",
        "a.parquet (part 2 of 10)",
    ]
    assert [sum(1 for _ in files.read(unit, ReadingReport())) for unit in units] == [10] * 10
    assert 1 < len(Files([path], unit_bytes=700).units()) < 10


def test_nulls_blanks_and_faults_are_counted(tmp_path):
    rows = [b"a", None, b"", b"\xff", b"b"]
    # Nothing checks that strings in a file are UTF-8.
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 1, 1, 2, 3)))
    column = pa.StringArray.from_buffers(5, offsets, pa.py_buffer(b"a\xffb"), pa.py_buffer(b"\x1d"))
    for kind, values in (("binary", pa.array(rows)), ("string", column)):
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"text": values}), path)
        documents, report = read(path)
        assert documents == [(f"{path.name}:0", b"a"), (f"{path.name}:4", b"b")]
        assert report.listed == {
            "no text under 'text'": [f"{path.name}:1"],
            "empty": [f"{path.name}:2"],
            "undecodable": [f"{path.name}:3 (byte 0)"],
        }
    expect_refused(
        r"string\.parquet:3: isn't UTF-8",
        tmp_path / "string.parquet",
        policy=Policy(undecodable="fail"),
    )


def test_a_column_inside_another(tmp_path):
    column = pa.array([{"text": "a", "n": 1}, None, {"text": None, "n": 2}, {"text": "b", "n": 3}])
    pq.write_table(pa.table({"meta": column}), tmp_path / "a.parquet")
    documents, report = read(tmp_path / "a.parquet", text_key="meta.text")
    assert [text for _, text in documents] == [b"a", b"b"]
    assert report.counts == {"no text under 'meta.text'": 2}
    expect_refused(
        r"no column 'meta.body'.*columns: text, n in meta",
        tmp_path / "a.parquet",
        text_key="meta.body",
    )


def test_a_text_that_a_file_has_once_for_many_rows_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "_UNPACKED", 1 << 20)
    pq.write_table(pa.table({"text": ["a" * 100_000] * 100}), tmp_path / "a.parquet")
    expect_refused(r"a\.parquet: unpacks to more than 100 times", tmp_path / "a.parquet")


def test_a_table_without_rows_is_reported(tmp_path):
    parquet(tmp_path / "a.parquet", [])
    assert read(tmp_path / "a.parquet")[1].listed == {"empty": ["a.parquet"]}


def test_a_wrong_column_raises_an_error_that_lists_the_columns(tmp_path):
    path = parquet(tmp_path / "a.parquet")
    expect_refused(r"no column 'body'; set text_key \(columns: id, text\)", path, text_key="body")
    expect_refused("column 'id' holds int64, not text", path, text_key="id")


def test_every_truncation_is_found(tmp_path):
    whole = parquet(tmp_path / "whole.parquet", TEXTS[:4]).read_bytes()
    path = tmp_path / "a.parquet"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        expect_refused(r"a\.parquet: truncated or damaged", path)


def test_a_damaged_page_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"text": TEXTS}), path, write_page_checksum=True, **plain)
    flip(path, path.read_bytes().index(b"row 3"))
    expect_refused(r"a\.parquet: truncated or damaged", path)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def test_a_data_set_saved_to_disk(tmp_path, datasets):
    table = datasets.Dataset.from_dict({"id": list(range(100)), "text": TEXTS})
    table.save_to_disk(tmp_path / "saved")
    documents, _ = read(f"hf://{tmp_path}/saved")
    assert documents == [(f"saved:{i}", text.encode()) for i, text in enumerate(TEXTS)]

    both = datasets.DatasetDict(train=table, test=table.select(range(90, 100)))
    both.save_to_disk(tmp_path / "both")
    documents, _ = read(f"hf://{tmp_path}/both:test", unit_bytes=100)
    assert documents == [(f"both:test:{i}", text.encode()) for i, text in enumerate(TEXTS[90:])]
    assert len(read(f"hf://{tmp_path}/both")[0]) == 100
    expect_refused("has no split 'dev'; choose one of train, test", f"hf://{tmp_path}/both:dev")
    expect_refused(r"no column 'body'.*columns: id, text", f"hf://{tmp_path}/both", text_key="body")


def test_a_folder_that_datasets_can_read(tmp_path, datasets):
    (tmp_path / "folder").mkdir()
    rows = lines(*({"text": text, "n": 1} for text in TEXTS), {"text": None, "n": 2})
    (tmp_path / "folder" / "train.jsonl").write_bytes(rows)
    documents, report = read(f"hf://{tmp_path}/folder:train[:50%]")
    assert [text.decode() for _, text in documents] == TEXTS[:50]
    documents, report = read(f"hf://{tmp_path}/folder")
    assert [text.decode() for _, text in documents] == TEXTS
    assert report.counts == {"no text under 'text'": 1}


def test_units_of_a_data_set_are_fixed_and_picklable(tmp_path, datasets):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    files = Files([f"hf://{tmp_path}/saved"], unit_bytes=400)
    units = files.units()
    assert len(units) > 2
    assert units == Files([f"hf://{tmp_path}/saved"], unit_bytes=400).units()
    other = pickle.loads(pickle.dumps(files))
    documents = [d.text.decode() for unit in units for d in other.read(unit, ReadingReport())]
    assert documents == TEXTS


def test_a_missing_data_set(tmp_path, datasets):
    (tmp_path / "empty").mkdir()
    for spec in (f"hf://{tmp_path}/empty", "hf://nobody/has-this-one"):
        expect_refused(f"{spec}: can't be loaded .*check its name", spec)


def test_the_package_datasets_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    expect_refused(r"hf://x: needs the package datasets.*pip install datasets", "hf://x")
