"""TensorBoard, wandb, trackio and traces: which package is needed, and what a real run leaves."""

import json
import sqlite3
import struct
from contextlib import closing
from types import SimpleNamespace

import pytest

from forescale.config.compose import compose
from forescale.config.sections import trackers
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.ground.storage import read_json
from forescale.train.trainer import traced
from tests import launching

LENGTH = ("train.tokens=null", "train.steps=8", "validation.every=8")


def logging_of(*overrides):
    return compose(TrainJob, ["train.steps=10", "schedule.warmup=0", *overrides]).logging


@pytest.fixture
def calls(monkeypatch):
    """Record the arguments that wandb is started with; no account is logged in."""
    import wandb

    calls = []

    def init(project, **settings):
        calls.append((project, settings))
        return SimpleNamespace(config=SimpleNamespace(update=lambda c, **_: calls.append(c)))

    monkeypatch.setattr(wandb, "init", init)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    return calls


def started(calls, run, *overrides, **identity):
    calls.clear()
    logging = logging_of("logging.wandb.enabled=true", *overrides)
    known = {"wandb_id": "0a1b", **identity}
    logging.check_trackers()
    (tracker,) = logging.trackers
    tracker.open(run, known, {"train": {"seed": 1}}, 0)
    return calls[0]


def test_no_tracker_is_enabled_by_default():
    assert logging_of().trackers == []


def test_a_run_is_one_curve_under_the_id_of_its_run_json(calls, tmp_path):
    words = ("logging.wandb.project=mine", "logging.wandb.group=wide", "logging.wandb.tags=[a,b]")
    data = {"identity": "f00d"}
    known = {"parameters": 7, "dataset": data, "git": {"commit": "c0de"}, "device": "H100"}
    project, first = started(calls, tmp_path / "first", *words, **known)
    assert (project, first["name"], first["resume"]) == ("mine", "first", "allow")
    assert (first["id"], first["group"], first["tags"]) == ("0a1b", "wide", ["a", "b"])
    assert first["dir"] == str(tmp_path / "first")
    facts = {"parameters": 7, "dataset_hash": "f00d", "git_commit": "c0de", "gpu": "H100"}
    assert calls[1] == {"train": {"seed": 1}, **facts, "versions": None}


def test_without_an_account_it_is_offline(calls, tmp_path, monkeypatch):
    assert started(calls, tmp_path)[1]["mode"] == "offline"
    with pytest.raises(UserError, match=r"no wandb account .*wandb login.*mode=offline"):
        started(calls, tmp_path, "logging.wandb.mode=online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert started(calls, tmp_path)[1]["mode"] == "online"
    assert started(calls, tmp_path, "logging.wandb.mode=offline")[1]["mode"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert started(calls, tmp_path)[1]["mode"] == "disabled"


def test_an_account_may_be_in_netrc_for_the_server_that_is_used(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".netrc"
    file.write_text("machine wandb.example login user password secret\n")
    file.chmod(0o600)
    assert not trackers.has_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    assert trackers.has_account()


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "forescale\[tensorboard\]"'):
        logging_of("logging.tensorboard.enabled=true").check_trackers()


def batches(first, end):
    for step in range(first, end):
        yield SimpleNamespace(step=step)


@pytest.mark.parametrize(
    ("first", "end", "has_trace"),
    [(0, 10, True), (4, 10, True), (0, 4, True), (0, 3, False), (5, 10, False)],
    ids=["whole", "begins inside", "ends inside", "ends before", "begins after"],
)
def test_the_steps_of_a_trace(tmp_path, monkeypatch, first, end, has_trace):
    import torch

    monkeypatch.setenv("RANK", "0")
    with traced((3, 5), tmp_path / "trace", batches(first, end)) as traced_batches:
        for batch in traced_batches:
            with torch.profiler.record_function(f"step {batch.step}"):
                pass
    file = tmp_path / "trace" / "rank-0.json"
    assert file.exists() == has_trace
    if has_trace:
        names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
        inside = {f"step {s}" for s in range(max(first, 3), min(end, 5))}
        assert {n for n in names if str(n).startswith("step ")} == inside


def test_without_an_interval_the_batches_are_the_same_object():
    items = batches(0, 3)
    with traced(None, None, items) as same:
        assert same is items


@pytest.fixture(scope="module")
def logged(dataset, tmp_path_factory):
    """A real run that has all of them: (run directory, output)."""
    folder = tmp_path_factory.mktemp("logged")
    everything = (
        "profile.steps=3:5",
        "logging.tensorboard.enabled=true",
        "logging.wandb.enabled=true",
        "logging.trackio.enabled=true",
    )
    everything += ("logging.wandb.group=g", "logging.wandb.tags=[t]")
    everything += ("validation.prompts=[def]", "validation.prompt_tokens=4")
    command = ("run.name=all", f"data.path={dataset}", *LENGTH, *everything)
    places = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    return folder / "all", launching.train(folder, *command, cold=True, **places)


@pytest.mark.slow  # a real run with profiler, wandb and TensorBoard
def test_a_real_trace_has_the_work_of_the_steps(logged):
    run, _ = logged
    trace = json.loads((run / "attempts/0001/trace/rank-0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::mm" in names
    assert any("backward" in str(name).lower() for name in names)


@pytest.mark.slow  # a real run with profiler, wandb and TensorBoard
def test_tensorboard_has_every_row(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = logged
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("train/loss")]
    rows = launching.rows(run)
    assert [step for step, _ in losses] == [row["step"] for row in rows]
    assert [value for _, value in losses] == pytest.approx([row["loss"] for row in rows])
    assert [e.step for e in events.Scalars("validation/bits_per_byte")] == [8]
    assert events.Scalars("train/layer_norms/head")[0].value > 0
    (text,) = events.Tensors("validation/text/0/text_summary")
    ((_, prompt, rest),) = launching.texts(run)
    assert text.tensor_proto.string_val[0].decode() == trackers.indented(prompt + rest)


@pytest.mark.slow  # a real run with profiler, wandb and TensorBoard
def test_trackio_has_every_row(logged):
    run, output = logged
    with closing(sqlite3.connect(run.parent / "trackio/forescale.db")) as database:
        rows = database.execute(
            "select run_name, step, metrics from metrics order by id"
        ).fetchall()
    values = [(step, json.loads(text)) for _, step, text in rows]
    losses = [(step, of["train/loss"]) for step, of in values if "train/loss" in of]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in launching.rows(run)]
    assert {name for name, _, _ in rows} == {f"all-{read_json(run / 'run.json')['wandb_id'][:6]}"}
    (text,) = [of["validation/text/0"] for _, of in values if "validation/text/0" in of]
    ((_, prompt, rest),) = launching.texts(run)
    assert text["_value"] == trackers.indented(prompt + rest)
    assert "Trackio" not in output


@pytest.mark.slow  # a real run with profiler, wandb and TensorBoard
def test_wandb_holds_every_row_and_asks_nothing(logged):
    """Its own process writes; a rank that left without waiting for it left an empty file."""
    run, output = logged
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    rows = [r for r in wandb_records(file) if r.HasField("history")]
    keys = [{"/".join(i.nested_key) or i.key for i in r.history.item} for r in rows]
    assert sum("train/loss" in each for each in keys) == len(launching.rows(run))
    assert any("validation/text/0/path" in each for each in keys)
    assert "(1)" not in output  # the menu of its log-in
    assert "Next:" in output


@pytest.mark.slow  # a real run with profiler, wandb and TensorBoard
def test_wandb_knows_which_run_it_is_and_what_it_ran_on(logged):
    run, _ = logged
    identity = read_json(run / "run.json")
    (file,) = run.glob(f"wandb/offline-run-*/run-{identity['wandb_id']}.wandb")
    run = next(r.run for r in wandb_records(file) if r.HasField("run"))
    assert (run.run_id, run.run_group, list(run.tags)) == (identity["wandb_id"], "g", ["t"])
    updates = [r.config for r in wandb_records(file) if r.HasField("config")]
    config = {i.key: json.loads(i.value_json) for c in (run.config, *updates) for i in c.update}
    assert config["dataset_hash"] == identity["dataset"]["identity"]
    assert config["parameters"] == identity["parameters"] > 10_000
    assert config["git_commit"] == identity["git"].get("commit")
    assert config["gpu"] == identity["device"] == "cpu"
    assert config["train"]["seed"] == 1337


def wandb_records(file):
    """The records of an offline run: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, records, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    return records
