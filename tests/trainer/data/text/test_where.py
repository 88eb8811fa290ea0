"""Rows are chosen by their fields; a rule and its opposite share out the rows with the field."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forescale.data.text.documents import ReadingReport
from forescale.data.text.files import Files
from forescale.ground.errors import UserError

ROWS = [
    {"text": f"text {i}", "score": i / 10 if i < 9 else None, "meta": {"site": f"{i % 3}.org"}}
    for i in range(10)
]


@pytest.fixture(params=["rows.jsonl", "rows.parquet"])
def path(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        flat = [{**row, "meta.site": row["meta"]["site"]} for row in ROWS]
        pq.write_table(pa.Table.from_pylist(flat), path)
    return path


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ({}, range(10)),
        ({"score": {"least": 0.3}}, range(3, 9)),
        ({"score": {"below": 0.3}}, range(3)),
        ({"score": {"least": "0.2", "below": 0.5}}, range(2, 5)),
        ({"meta.site": ["0.org", "2.org"]}, [0, 2, 3, 5, 6, 8, 9]),
        ({"meta.site": {"not": ["0.org", "2.org"]}}, [1, 4, 7]),
        ({"meta.site": "0.org", "score": {"least": 0.5}}, [6]),
    ],
)
def test_the_rows_that_the_rules_allow_are_read_and_the_others_counted(path, where, numbers):
    source, report = Files([path], where=where), ReadingReport()
    read = [d.text.decode() for unit in source.units() for d in source.read(unit, report)]
    assert read == [f"text {i}" for i in numbers]
    assert report.counts.get("left out by where", 0) == 10 - len(read)
    assert source.describe().get("where", {}).keys() == where.keys()


def test_a_file_without_fields_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("A text.")
    source, report = Files([tmp_path / "a.txt"], where={"site": "a.org"}), ReadingReport()
    assert [d for unit in source.units() for d in source.read(unit, report)] == []
    assert report.counts == {"left out by where": 1}


def test_wrong_rules_and_columns_are_named(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), path := tmp_path / "rows.parquet")
    for rule in ({"blow": 1}, {"least": "high"}, {"least": float("nan")}):
        with pytest.raises(UserError, match=r"where.score: .* is no rule"):
            Files([path], where={"score": rule})
    source = Files([path], where={"scores": "a"})
    with pytest.raises(UserError, match=r"where.scores: .*no such column.*text, score, meta"):
        [*source.read(source.units()[0], ReadingReport())]
