"""Records of tables under our names."""

import json
import math
import os

import pandas as pd
import pytest

from forescale.config.compose import compose
from forescale.ground.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.records.tables import is_export, of_export, read_export
from forescale.scaling.study.inputs import read


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


@pytest.mark.parametrize("column", ["parameters", "budget"])
@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ('"7,503,872"', "'7,503,872'"),
        ("7.5M", "'7.5M'"),
        ("1e300", "1e+300"),
        ("\x1b[2J", r"'\x1b[2J'"),
    ],
)
def test_a_cell_that_is_no_number_is_named(tmp_path, column, cell, text):
    table = tmp_path / "points.csv"
    table.write_text(f"loss,{column}\n3.1,1e15\n3.0,{cell}\n")
    with pytest.raises(UserError) as caught:
        of_export(table, {})
    assert f"{table}, column '{column}', row 1: {text}" in str(caught.value)
    assert "7503872 or 7.5e6" in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("1e15 1e15", None),
        ("1e15 1e400", "inf is not a positive number"),
        (" ", None),
        ("1e15 ", "is empty"),
        ("1e15 0", "0 is not a positive number"),
    ],
)
def test_budgets_are_of_all_runs_or_of_none(tmp_path, cells, message):
    table = tmp_path / "points.csv"
    first, second = cells.split(" ")
    table.write_text(f"loss,budget\n3.1,{first}\n3.0,{second}\n")
    if message is None:
        assert ("budget" in of_export(table, {})[0]) == bool(first)
        return
    with pytest.raises(UserError, match=f"budget of row 1: {message}; give each run"):
        of_export(table, {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "loss,tokens\n", "has no rows"),
        ("a.json", "[" * 100_000, "can't be read as a table"),
        ("a.json", '[{"config": 3, "summary": 4}]', "is no object, but 3"),
        ("a.csv", 'config,summary,name\n"' + "[" * 2000 + '",{},x\n', "are not dicts"),
    ],
)
def test_a_table_of_another_shape_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        of_export(tmp_path / name, {})


# The table of runs as the web page exports it: all values quoted, config and summary in one row.
RUNS = """\
"Name","State","Notes","User","Tags","Created","model.n_params","train.lr","tokens","train/loss","val/loss"
"gpt-8m","finished","-","ada","base, b","5-2T09:11Z","8123904","0.003","160000000","3.61","3.5713"
"gpt-16m","finished","","ada","","5-2T11:00Z","16254976","0.002","320000000","3.30","3.2711"
"gpt-16m-b","crashed","","ada","","5-2T11:00Z","16254976","0.02","320000000","5.9","5.91"
"gpt-32m","running","","ada","","5-2T12:00Z","32514048","0.002","640000000","4.2",""
"gpt-64m","finished","","ada","","5-2T12:00Z","65028096","0.002","640000000","4.2",""
"""
# A chart: each run's metrics and steps with __MIN and __MAX.
CHART = """\
"Step","gpt - 8m - _step","gpt - 8m - _step__MIN","gpt - 8m - _step__MAX","gpt - 8m - val/loss",\
"gpt - 8m - val/loss__MIN","gpt - 8m - val/loss__MAX","b - val/loss",\
"b - val/loss__MIN","b - val/loss__MAX"
"200","200","200","200","3.9","3.9","3.9","3.8","3.8","3.8"
"100","100","100","100","4.5","4.5","4.5","4.4","4.4","4.4"
"300","","","","","","","3.5","3.5","3.5"
"""
COLUMNS = {"parameters": "model.n_params", "loss": "val/loss"}


def dumped(name: str, n: int, loss: float | str, state: str = "finished", **options) -> dict:
    """A run of wandb's API as a script writes it."""
    summary = {"val/loss": loss, "_step": 500, "loss": {"min": 3.0}, **options}
    config = {"model": {"n_params": n, "heads": [4, 4]}, "_wandb": {"cli_version": "0.17"}, "lr": 1}
    return {"id": f"{n:x}", "name": name, "state": state, "config": config, "summary": summary}


@pytest.fixture
def write(tmp_path):
    def file(name: str, text: str):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return file


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.tsv.gz"])
def test_tables_may_be_separated_by_tabs_and_compressed(name, tmp_path):
    rows = pd.DataFrame({"parameters": [1e6, 2e6], "loss": [3.5, 3.25], "name": ["a, b", "c"]})
    path = tmp_path / name
    rows.to_csv(path, index=False, sep="\t" if ".tsv" in name else ",")
    assert is_export(path)
    pd.testing.assert_frame_equal(read_export(path).table, rows)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.gz"])
def test_a_file_that_is_not_what_its_name_says_is_refused(name, write):
    with pytest.raises(UserError, match=rf"{name}: truncated or damaged"):
        read_export(write(name, "loss"))


def test_a_file_with_another_ending_is_refused_with_those_that_are_read(write):
    path = write("points.xlsx", "loss")
    job = compose(StudyJob, [f"input=[{path}]"])
    with pytest.raises(UserError, match=r"is no table by .*\.csv\.gz, \.tsv, \.tsv\.gz"):
        read(job)


def test_unfinished_runs_of_a_table_are_refused(write):
    table, refused = of_export(write("wandb.csv", RUNS), COLUMNS)
    assert list(table["name"]) == ["gpt-8m", "gpt-16m"]
    assert list(table["parameters"]) == [8123904, 16254976]
    assert list(table["tokens"]) == [160000000, 320000000], "our own names need no mapping"
    assert list(table["loss"]) == [3.5713, 3.2711]
    assert {r.name: r.why for r in refused} == {
        "gpt-16m-b": "its state is crashed",
        "gpt-32m": "its state is running",
        "gpt-64m": "it has no value of val/loss",
    }


def test_rows_are_selected_before_runs_are_refused(write):
    table, refused = of_export(write("wandb.csv", RUNS), COLUMNS, {"train.lr": "0.003"})
    assert (list(table["name"]), refused) == (["gpt-8m"], [])
    with pytest.raises(UserError, match=r"none of its 1 runs is finished.*its state is crashed"):
        of_export(write("wandb.csv", RUNS), COLUMNS, {"train.lr": "0.02"})


def test_a_plain_table_with_a_state_column_is_no_export(write):
    """The states of a country, for example."""
    text = "name,state,loss\na,Ohio,3.0\nb,Utah,2.9\n"
    table, refused = of_export(write("plain.csv", text), {})
    assert (len(table), refused) == (2, [])


def test_the_last_value_of_each_run_of_a_chart_is_taken(write):
    table, refused = of_export(write("chart.csv", CHART), {"loss": "val/loss", "tokens": "Step"})
    assert table.to_dict("list") == {
        "name": ["gpt - 8m", "b"], "loss": [3.9, 3.5], "tokens": [200, 300],
    }  # fmt: skip
    assert refused == []


@pytest.mark.parametrize("form", ["lines", "list", "directory"])
def test_dumped_runs_of_the_api(write, tmp_path, form):
    runs = [
        dumped("a", 8000, 3.5), dumped("b", 16000, 3.2), dumped("c", 1, 9.9, "failed"),
        dumped("d", 32000, "NaN"),
    ]  # fmt: skip
    if form == "lines":
        path = write("runs.jsonl", "".join(json.dumps(run) + "\n" for run in runs))
    elif form == "list":
        path = write("runs.json", json.dumps(runs, indent=1))
    else:
        for run in runs:
            write(f"dump/{run['name']}.json", json.dumps(run))
        path = tmp_path / "dump"
    assert is_export(path)
    table, refused = of_export(path, COLUMNS)
    assert table.to_dict("list") == {
        "name": ["a", "b"], "parameters": [8000, 16000], "loss": [3.5, 3.2],
    }  # fmt: skip
    assert {r.name: r.why for r in refused} == {
        "c": "its state is failed", "d": "it has no value of val/loss",
    }  # fmt: skip


def test_nested_keys_are_dotted_and_summary_keys_never_replace_config_keys(write):
    run = dumped("a", 8000, 3.5, lr=0.1)
    row = read_export(write("a.json", json.dumps(run))).table.iloc[0]
    assert row["model.n_params"] == 8000
    assert row["loss.min"] == 3.0
    assert (row["lr"], row["summary.lr"]) == (1, 0.1)
    assert not [key for key in row.index if "wandb" in key]


def test_the_json_of_the_service(write):
    """Sections are text, settings are wrapped, and the display name is beside the id."""
    one = {
        "name": "x1y2", "displayName": "gpt-8m", "state": "finished",
        "config": json.dumps({"n": {"desc": None, "value": 8000}}),
        "summaryMetrics": json.dumps({"loss": 3.5}),
    }  # fmt: skip
    table, _ = of_export(write("a.json", json.dumps([one])), {"parameters": "n"})
    assert table.to_dict("records") == [{"name": "gpt-8m", "parameters": 8000, "loss": 3.5}]


def test_the_csv_of_the_example_in_wandbs_manual(write, tmp_path):
    """Its sections are the text of Python dicts."""
    frame = {
        "summary": [{"loss": 3.5, "x": math.nan}, {"loss": math.inf}],
        "config": [{"n": 8000, "name": "nan"}, {"n": 9000}],
        "name": ["a", "b"],
    }
    pd.DataFrame(frame).to_csv(tmp_path / "project.csv")
    table, _ = of_export(tmp_path / "project.csv", {"parameters": "n"})
    assert table.to_dict("list") == {
        "name": ["a", "b"], "parameters": [8000, 9000], "loss": [3.5, math.inf],
    }  # fmt: skip


def test_plain_json_lines_are_a_plain_table(write):
    path = write("rows.jsonl", '{"loss": 3.0, "size": {"n": 5}}\n{"loss": 2.0, "size": {"n": 7}}\n')
    table, _ = of_export(path, {"parameters": "size.n"})
    assert list(table["parameters"]) == [5, 7]


def test_unreadable_exports_are_refused(write, tmp_path):
    for name in ("pipe.csv", "pipe.parquet", "pipe.json"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: is a pipe"):
            read_export(tmp_path / name)
    with pytest.raises(UserError, match=r"no\.csv: doesn't exist"):
        of_export(tmp_path / "no.csv", {})
    for name, text in (("a.json", "{"), ("empty.csv", "")):
        with pytest.raises(UserError, match="can't be read as a table"):
            read_export(write(name, text))
    with pytest.raises(UserError, match=r"can't be read as a table.*holds no objects"):
        read_export(write("b.json", "[1, 2]"))
    mixed = write("c.jsonl", json.dumps(dumped("a", 1, 1.0)) + '\n{"loss": 1}\n')
    with pytest.raises(UserError, match="1 of its 2 objects have no config and summary"):
        read_export(mixed)
    write("study/plan.json", '{"cells": []}')
    assert not is_export(tmp_path / "study")
    assert not is_export(tmp_path / "nowhere")
