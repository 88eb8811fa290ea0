"""Records of runs, and the points that a fit takes of them."""

import json
import math
import shutil

import pandas as pd
import pytest

from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.data.dataset import Dataset
from forescale.ground.errors import UserError
from forescale.ground.storage import read_json
from forescale.models.flops import count, flops_per_token
from forescale.resilience.outcome import record_end, record_start
from forescale.run.directory import Parent, Run
from forescale.scaling.records.records import Refused, of_runs, points, record
from forescale.scaling.records.tables import of_export
from tests.trainer.small_run import change_rows, make_run


@pytest.fixture(scope="module")
def complete_run(small_data, tmp_path_factory) -> Run:
    return make_run(small_data, tmp_path_factory.mktemp("complete") / "runs", "small")


@pytest.fixture
def run(complete_run, tmp_path) -> Run:
    """A copy of the run, which a test may change."""
    return Run(shutil.copytree(complete_run.path, tmp_path / "runs" / "small"))


def change(run: Run, kind: str, **values) -> None:
    def changed(rows):
        return [{**row, **values} if row["kind"] == kind else row for row in rows]

    change_rows(run.metrics, changed)


def test_a_record_has_every_convention_of_sizes_and_costs(run):
    """Other tests compare the formulas with torch's counter to the last FLOP."""
    job = thaw(TrainJob, run.config)
    sizes, row, length = count(job.model), record(run), job.train.sequence_length
    assert row["flops_causal"] == row["tokens"] * flops_per_token(job.model, length, causal=True)
    assert row["flops_full"] == row["tokens"] * flops_per_token(job.model, length)
    assert row["flops_6nd"] == 6 * row["tokens"] * row["parameters_blocks_and_head"]
    assert row["parameters_blocks_and_head"] == sizes.blocks + sizes.head
    assert row["parameters_total"] == sizes.total
    assert row["parameters_non_embedding"] == sizes.non_embedding
    assert row["parameters_active"] == sizes.active == sizes.total, "it has no experts"
    assert row["tokens"] == job.total_steps * job.tokens_per_step
    assert row["learning_rate"] == job.optimizer.learning_rate
    assert row["loss"] > 0
    assert row["trunk"] == "small"


def test_a_record_has_the_abilities_under_the_names_of_the_rows(run):
    assert not [name for name in record(run) if name.startswith("ability/")]
    measured = {"ability/copy/4": 0.25, "ability/copy/4_stderr": 0.04, "ability/copy/4_nats": 3.5}
    change(run, "validation", **measured)
    assert measured.items() <= record(run).items()


def test_a_record_has_the_expansion_of_its_experts(run, small_data, tmp_path):
    assert record(run)["expansion"] == 1
    arguments = ["model.mlp=moe", "model.mlp.experts=7", "model.mlp.top_k=2", "model.mlp.shared=1"]
    row = record(make_run(small_data, tmp_path / "runs", "mixture", *arguments))
    assert row["expansion"] == (7 + 1) / (2 + 1)
    assert row["parameters_active"] < row["parameters_total"]
    assert points(pd.DataFrame([row]), "active", "causal", "x").expansion == row["expansion"]


def test_a_record_defines_its_loss(run, small_data):
    """As text, which differs for runs that were evaluated in another way."""
    dataset = Dataset(small_data)
    assert record(run)["loss_definition"] == (
        "held-out cross-entropy, nats per token, mean over the targets, ends of text included, of "
        f"7 windows of 32 tokens of the validation split of dataset {dataset.identity[:16]}, "
        "attention across documents"
    )
    change(run, "validation", windows=9, targets=250)
    assert "the 250 targets, ends of text included, of 9 windows" in record(run)["loss_definition"]


def test_a_record_has_its_recipe_and_its_seeds(small_data, tmp_path):
    arguments = ["model.num_layers=1", "model.width=32", "model.num_heads=2", "train.seed=5"]
    arguments += ["schedule=wsd", "schedule.decay=2 steps", "optimizer.weight_decay=0.05"]
    row = record(make_run(small_data, tmp_path / "runs", "wsd", *arguments))
    assert (row["schedule"], row["warmup_steps"], row["decay_steps"]) == ("wsd", 1, 2)
    assert (row["seed"], row["weight_decay"]) == (5, 0.05)
    assert row["init_seed"] == 5, "that of the data unless another is given"
    assert row["parametrization"] == "standard"


def test_a_record_has_its_unique_tokens_epochs_and_bytes(run, small_data):
    split, row = Dataset(small_data).split("train"), record(run)
    once = sum(n - 1 for n in split.shard_tokens)
    assert row["unique_tokens"] == min(row["tokens"], once)
    assert row["epochs"] == pytest.approx(row["tokens"] / once)
    assert row["bytes"] == round(row["tokens"] * split.num_bytes / split.num_tokens)
    change(run, "train", tokens=10 * once)
    assert record(run)["unique_tokens"] == once
    assert record(run)["epochs"] == pytest.approx(10)


def test_a_replaced_dataset_is_not_used(run):
    stored = read_json(run.identity)
    for source in stored["dataset"]["sources"].values():
        source["identity"] = "0" * 64
    run.identity.write_text(json.dumps(stored))
    assert record(run)["unique_tokens"] is None


def test_unknown_values_are_none(small_data, tmp_path):
    """The dataset is gone; the number of ranks comes from the checkpoints."""
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    run = make_run(data, tmp_path / "runs", "small")
    before = record(run)
    assert before["world_size"] == 2
    hours = before["seconds"] * 2 / 3600
    assert before["device_hours"] == pytest.approx(hours, rel=1e-6)
    shutil.rmtree(data)
    row = record(run)
    unknown = {"unique_tokens", "epochs", "bytes", "validation_hash"}
    assert {name for name in row if row[name] is None and before[name] is not None} == unknown
    assert row["loss_definition"] == before["loss_definition"]
    assert row["tokenizer"] == before["tokenizer"]


def test_device_hours_sum_over_launches_with_their_own_ranks(run):
    first, second = run.attempts()[0], run.new_attempt()
    for attempt, ranks in ((first, 2), (second, 4)):
        record_start(attempt.path, ["x"], ranks)
        record_end(attempt.path, 0, "done")
    launches = [read_json(a.path / "launch.json") for a in (first, second)]
    for attempt, facts, (begun, ended) in zip(
        (first, second), launches, ((1000, 4600), (5000, 6800)), strict=True
    ):
        times = {"begun": begun, "ended": ended, "monotonic": begun, "seconds": ended - begun}
        text = json.dumps({**facts, **times})
        (attempt.path / "launch.json").write_text(text)
    second.start_from(Parent(8), run)
    row = record(run)
    assert row["device_hours"] == pytest.approx(2 * 1 + 4 * 0.5)
    assert row["seconds"] == pytest.approx(3600), "a launch of a complete run adds no wait"


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda run: change(run, "validation", step=3), "its last step was not evaluated"),
        (lambda run: change(run, "validation", loss=None), "it diverged: its loss is not finite"),
    ],
)
def test_a_run_that_is_no_record_is_refused_with_the_reason(run, harm, why):
    harm(run)
    records = record(run)
    assert isinstance(records, Refused)
    assert records.why == why


def test_of_runs_returns_records_and_refusals(run, small_data, tmp_path):
    other = make_run(small_data, tmp_path / "runs", "half")
    shutil.rmtree(other.checkpoints)
    table, refused = of_runs([run, other])
    assert list(table["name"]) == ["small"]
    assert [one.name for one in refused] == ["half"]
    assert "at step" in refused[0].why


def test_runs_of_different_losses_tokenizers_or_vocabularies_are_not_comparable():
    table = pd.DataFrame({
        "loss": [1.0, 2.0, 3.0], "tokenizer": ["a", "b", "b"], "vocab_size": [256, 512, 512],
        "parametrization": ["standard", "mup", "mup"], "loss_definition": ["x", "y", "z"],
    })  # fmt: skip
    message = "2 different values of vocab_size and 2 .* tokenizer and 2 .* parametrization and 3 "
    with pytest.raises(UserError, match=message):
        points(table, "total", "causal", "x")


def test_a_csv_of_records_keeps_every_convention(run, tmp_path):
    path = tmp_path / "records.csv"
    of_runs([run])[0].to_csv(path, index=False)
    table, _ = of_export(path, {})
    assert {"parameters_total", "parameters_active", "flops_full", "loss_definition"} <= set(table)
    assert points(table, "total", "6nd", "x").parameters == [record(run)["parameters_total"]]


def test_the_convention_selects_the_column():
    table = pd.DataFrame(
        {"loss": [1.0], "parameters_total": [7], "parameters_non_embedding": [5], "tokens": [3]}
    )
    assert points(table, "total", "causal", "x").parameters == [7]
    records = points(table, "non_embedding", "causal", "x")
    assert records.parameters == [5]
    assert records.flops is None
    assert math.isclose(records.tokens[0], 3)
