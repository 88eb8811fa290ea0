"""Records: what a run is worth to a law; tables of others under our names."""

import json
import math

import pandas as pd
import pytest
from small_run import make_run

from models.flops import count, flops_per_token
from trainer.errors import UserError
from trainer.run import Run
from trainer.scaling.records import Refused, of_runs, of_table, points, record


@pytest.fixture
def run(small_data, tmp_path, monkeypatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return make_run(small_data, "runs", "small")


def change(run: Run, kind: str, **values) -> None:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    rows = [{**row, **values} if row["kind"] == kind else row for row in rows]
    run.metrics.resolve().write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_record_has_every_convention(run):
    from trainer.frozen import thaw

    job = thaw("train", run.config)
    sizes, row = count(job.model), record(run)
    assert row["parameters_blocks_and_head"] == sizes.blocks + sizes.head
    assert row["parameters_total"] == sizes.total
    assert row["parameters_non_embedding"] == sizes.non_embedding
    assert row["tokens"] == job.total_steps * job.tokens_per_step
    assert row["learning_rate"] == job.optimizer.learning_rate
    assert row["loss"] > 0
    assert row["trunk"] == "small"


def test_costs_are_those_of_the_formulas(run):
    """Which tests hold against torch's counter to the last FLOP."""
    from trainer.frozen import thaw

    job, row = thaw("train", run.config), record(run)
    length = job.train.sequence_length
    assert row["flops_causal"] == row["tokens"] * flops_per_token(job.model, length, causal=True)
    assert row["flops_full"] == row["tokens"] * flops_per_token(job.model, length)
    assert row["flops_6nd"] == 6 * row["tokens"] * row["parameters_blocks_and_head"]


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda run: change(run, "validation", step=3), "its last step was not evaluated"),
        (lambda run: change(run, "validation", loss=None), "it diverged: its loss is no number"),
    ],
)
def test_what_is_no_record_says_why(run, harm, why):
    harm(run)
    found = record(run)
    assert isinstance(found, Refused)
    assert found.why == why


def test_of_runs_keeps_both(run, small_data, tmp_path):
    import shutil

    other = make_run(small_data, tmp_path / "runs", "half")
    shutil.rmtree(other.checkpoints)
    table, refused = of_runs([run, other])
    assert list(table["name"]) == ["small"]
    assert [one.name for one in refused] == ["half"]
    assert "at step" in refused[0].why


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "points.csv"
    rows = {"Model Size": [1e6, 2e6], "D": [1e8, 2e8], "final": [3.0, 2.8], "set": ["a", "b"]}
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


NAMES = {"parameters": "Model Size", "tokens": "D", "loss": "final"}


def test_a_table_comes_under_our_names(csv):
    table = of_table(csv, NAMES)
    assert list(table.columns) == ["parameters", "tokens", "loss"]
    assert list(of_table(csv, NAMES, {"set": "b"})["loss"]) == [2.8]


def test_parquet_too(csv, tmp_path):
    pd.read_csv(csv).to_parquet(tmp_path / "points.parquet")
    assert of_table(tmp_path / "points.parquet", NAMES).equals(of_table(csv, NAMES))


@pytest.mark.parametrize(
    ("columns", "rows", "said"),
    [
        ({"loss": "fina"}, {}, "has no column 'fina'.*'final'"),
        ({"lss": "final"}, {}, "columns.lss: is no column of a record"),
        ({"parameters": "Model Size"}, {}, "has no column 'loss'"),
        (NAMES, {"st": "a"}, "has no column 'st'.*'set'"),
        (NAMES, {"set": "c"}, "no row has 'c' as its set; such are: a, b"),
    ],
)
def test_a_column_that_is_not_there_is_a_sentence(csv, columns, rows, said):
    with pytest.raises(UserError, match=said):
        of_table(csv, columns, rows)


def test_a_file_that_is_no_table_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        of_table(tmp_path / "no.csv", {})
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="can't be read as a table"):
        of_table(tmp_path / "empty.csv", {})


def test_runs_of_different_vocabularies_do_not_compare():
    table = pd.DataFrame({"loss": [1.0, 2.0], "parameters": [1, 2], "vocab_size": [256, 512]})
    with pytest.raises(UserError, match="2 different values of vocab_size"):
        points(table, "total", "causal", "x")


def test_the_convention_chooses_the_column():
    table = pd.DataFrame(
        {"loss": [1.0], "parameters_total": [7], "parameters_non_embedding": [5], "tokens": [3]}
    )
    assert points(table, "total", "causal", "x").parameters == [7]
    found = points(table, "non_embedding", "causal", "x")
    assert found.parameters == [5]
    assert found.flops is None
    assert math.isclose(found.tokens[0], 3)
