"""Records of tables under our names."""

import pandas as pd
import pytest

from forescale.errors import UserError
from forescale.scaling.records.tables import of_export


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "points.csv"
    rows = {"Model Size": [1e6, 2e6], "D": [1e8, 2e8], "final": [3.0, 2.8], "set": ["a", "b"]}
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


NAMES = {"parameters": "Model Size", "tokens": "D", "loss": "final"}


def test_a_table_gets_our_names(csv):
    table, _ = of_export(csv, NAMES)
    assert list(table.columns) == ["parameters", "tokens", "loss"]
    assert list(of_export(csv, NAMES, {"set": "b"})[0]["loss"]) == [2.8]


def test_parquet_is_read_like_csv(csv, tmp_path):
    pd.read_csv(csv).to_parquet(tmp_path / "points.parquet")
    table, _ = of_export(tmp_path / "points.parquet", NAMES)
    assert table.equals(of_export(csv, NAMES)[0])


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ({"loss": "fina"}, {}, "has no column 'fina'.*'final'"),
        ({"lss": "final"}, {}, "columns.lss: is not a column of a record"),
        ({"parameters": "Model Size"}, {}, "has no column 'loss'"),
        (NAMES, {"st": "a"}, "has no column 'st'.*'set'"),
        (NAMES, {"set": "c"}, "no row has set='c'; use one of: a, b"),
    ],
)
def test_a_missing_column_or_value_is_refused(csv, columns, rows, message):
    with pytest.raises(UserError, match=message):
        of_export(csv, columns, rows)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        of_export(tmp_path / "no.csv", {})
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="can't be read as a table"):
        of_export(tmp_path / "empty.csv", {})


@pytest.mark.parametrize("column", ["parameters", "budget"])
@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ('"7,503,872"', "'7,503,872'"),
        ("7.5M", "'7.5M'"),
        ("1e300", "1e+300"),
        ("\x1b[2J", r"'\x1b[2J'"),
    ],
)
def test_a_cell_that_is_no_number_is_named(tmp_path, column, cell, shown):
    table = tmp_path / "points.csv"
    table.write_text(f"loss,{column}\n3.1,1e15\n3.0,{cell}\n")
    with pytest.raises(UserError) as caught:
        of_export(table, {})
    assert f"{table}, column '{column}', row 1: {shown}" in str(caught.value)
    assert "7503872 or 7.5e6" in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ("1e15 1e15", None),
        ("1e15 1e400", "inf is not a positive number"),
        (" ", None),
        ("1e15 ", "is empty"),
        ("1e15 0", "0 is not a positive number"),
    ],
)
def test_budgets_are_of_all_runs_or_of_none(tmp_path, cells, said):
    table = tmp_path / "points.csv"
    first, second = cells.split(" ")
    table.write_text(f"loss,budget\n3.1,{first}\n3.0,{second}\n")
    if said is None:
        assert ("budget" in of_export(table, {})[0]) == bool(first)
        return
    with pytest.raises(UserError, match=f"budget of row 1: {said}; give each run"):
        of_export(table, {})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "loss,tokens\n", "has no rows"),
        ("a.json", "[" * 100_000, "can't be read as a table"),
        ("a.json", '[{"config": 3, "summary": 4}]', "is no object, but 3"),
        ("a.csv", 'config,summary,name\n"' + "[" * 2000 + '",{},x\n', "are not dicts"),
    ],
)
def test_a_table_of_another_shape_is_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        of_export(tmp_path / name, {})
