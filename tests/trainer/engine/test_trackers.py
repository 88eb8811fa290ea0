"""TensorBoard, wandb and traces: whose package is asked for what, and what a real run leaves."""

import json
from types import SimpleNamespace

import pytest

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.engine import trackers
from forescale.errors import UserError
from forescale.train.profiler import traced
from tests import launching

LENGTH = ("train.tokens=null", "train.steps=8", "validation.every=8")


def logging_of(*overrides):
    return compose(TrainJob, ["train.steps=10", "schedule.warmup=0", *overrides]).logging


@pytest.fixture
def asked(monkeypatch):
    """Record the arguments that wandb is started with; no account is logged in."""
    calls = []

    class Tracker:
        name = "wandb"

        def __init__(self, project, **settings):
            calls.append((project, settings))

        def start(self):
            pass

        def store_init_configuration(self, config):
            calls.append(config)

    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "WandBTracker", Tracker)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    return calls


def started(asked, run, name="first", *overrides):
    asked.clear()
    logging = logging_of("logging.wandb.enabled=true", *overrides)
    trackers.open_trackers(logging, run, name, {"train": {"seed": 1}}, 0)
    return asked[0]


def test_nothing_is_opened_unless_asked_for(tmp_path):
    assert trackers.open_trackers(logging_of(), tmp_path, "first", {}, 0) == []
    assert list(tmp_path.iterdir()) == []


def test_all_attempts_of_a_run_are_one_curve(asked, tmp_path):
    project, first = started(asked, tmp_path)
    assert (project, first["name"], first["resume"]) == ("forescale", "first", "allow")
    assert first["dir"] == str(tmp_path)
    assert asked[1] == {"train": {"seed": 1}}
    assert started(asked, tmp_path)[1]["id"] == first["id"]
    assert started(asked, tmp_path, "second")[1]["id"] != first["id"]
    other = started(asked, tmp_path, "first", "logging.wandb.project=mine")
    assert other[0] == "mine"
    assert other[1]["id"] != first["id"]


def test_without_an_account_nothing_is_asked(asked, tmp_path, monkeypatch):
    assert started(asked, tmp_path)[1]["mode"] == "offline"
    with pytest.raises(UserError, match=r"no wandb account .*wandb login.*mode=offline"):
        started(asked, tmp_path, "first", "logging.wandb.mode=online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert started(asked, tmp_path)[1]["mode"] == "online"
    assert started(asked, tmp_path, "first", "logging.wandb.mode=offline")[1]["mode"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert started(asked, tmp_path)[1]["mode"] == "disabled"


def test_an_account_may_be_in_netrc_for_the_server_that_is_used(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".netrc"
    file.write_text("machine wandb.example login user password secret\n")
    file.chmod(0o600)
    assert not trackers.has_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    assert trackers.has_account()


def test_a_missing_package_is_a_sentence(tmp_path, monkeypatch):
    import accelerate.utils

    monkeypatch.setattr(accelerate.utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(UserError, match=r'pip install "forescale\[tensorboard\]"'):
        trackers.open_trackers(logging_of("logging.tensorboard=true"), tmp_path, "first", {}, 0)


def batches(first, end):
    for step in range(first, end):
        yield SimpleNamespace(step=step)


@pytest.mark.parametrize(
    ("first", "end", "written"),
    [(0, 10, True), (4, 10, True), (0, 4, True), (0, 3, False), (5, 10, False)],
    ids=["whole", "begins inside", "ends inside", "ends before", "begins after"],
)
def test_the_steps_of_a_trace(tmp_path, monkeypatch, first, end, written):
    import torch

    monkeypatch.setenv("RANK", "0")
    with traced((3, 5), tmp_path / "trace", batches(first, end)) as traced_batches:
        for batch in traced_batches:
            with torch.profiler.record_function(f"step {batch.step}"):
                pass
    file = tmp_path / "trace" / "rank-0.json"
    assert file.exists() == written
    if written:
        names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
        inside = {f"step {s}" for s in range(max(first, 3), min(end, 5))}
        assert {n for n in names if str(n).startswith("step ")} == inside


def test_without_an_interval_the_batches_are_the_same_object():
    items = batches(0, 3)
    with traced(None, None, items) as same:
        assert same is items


@pytest.fixture(scope="module")
def logged(dataset, tmp_path_factory):
    """A real run that everything was asked of: (run directory, output)."""
    folder = tmp_path_factory.mktemp("logged")
    everything = ("profile.steps=3:5", "logging.tensorboard=true", "logging.wandb.enabled=true")
    command = ("run.name=all", f"data.path={dataset}", *LENGTH, *everything)
    return folder / "all", launching.train(folder, *command, WANDB_MODE="offline")


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


@pytest.mark.slow  # a real run with profiler, wandb and TensorBoard
def test_wandb_holds_every_row_and_asks_nothing(logged):
    """Its own process writes; a rank that left without waiting for it left an empty file."""
    run, output = logged
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert file.read_bytes().count(b"train/loss") >= len(launching.rows(run))
    assert "(1)" not in output  # the menu of its log-in
    assert "Next:" in output
