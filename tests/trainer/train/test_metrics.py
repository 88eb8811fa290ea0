"""Rows, the progress line, and trackers."""

import math
import re
from dataclasses import replace

import pytest
import torch

from forescale.checkpoint.reader import Position
from forescale.config.duration import Duration
from forescale.config.sections.batch import Cadence
from forescale.engine.step import Facts
from forescale.engine.world import StepSummary
from forescale.ground.console import span
from forescale.run.abilities import Accuracy
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from forescale.train.callbacks import Every, Step
from forescale.train.evaluate import Score
from forescale.train.guard import Decision
from forescale.train.metrics import Metrics, Prices, ProgressLine, clock, short

TOTAL = 1954


class Tracker:
    def __init__(self):
        self.rows = []

    def log(self, values, step):
        self.rows.append((step, values))


@pytest.fixture
def metrics(tmp_path):
    """Metrics of rank 0 with one tracker; `.attempt`, `.trackers`."""

    def make(every="10 steps", is_main=True, **options):
        run = Run(tmp_path / "first")
        attempt = run.new_attempt()
        length = Duration.parse(every)
        due = Every(Cadence(length.steps(20, TOTAL)), TOTAL)
        line = ProgressLine(due, TOTAL, 0, is_main)
        prices = Prices(full=600.0, causal=500.0, six_n=400.0, peak=1e6)
        rates = {"muon": 0.02, "decayed": 0.004}
        return Metrics(
            attempt, lambda step: (prices, prices), rates, line, [Tracker()], lambda: 4096, is_main
        )

    return make


def step(t, loss=30.0, seconds=0.25, applied=True, norm=2.0):
    position = Position(t, 8 * t, 20 * t)
    facts = Facts(torch.tensor([loss]), norm, applied)
    spent = {"data": seconds / 5, "compute": 4 * seconds / 5, "logging": 1.0}
    return Step(position, 8 * (t - 1), {"data": 20}, 0.5, facts, spent)


def summary(t, losses=(30.0, 50.0), seconds=0.5):
    return StepSummary(t, list(losses), 2**63 + t, False, False, seconds * t)


def test_a_row_holds_every_key_with_all_digits(metrics):
    new = metrics()
    losses = (1 / 3, 1 / 7)
    new.see(step(5), summary(5, losses))
    (row,) = read_rows(new.attempt.metrics.path)
    assert row.pop("seconds") == {"data": 0.05, "compute": 0.2, "logging": 1.0}
    assert row == {
        "kind": "train",
        "step": 5,
        "attempt": 1,
        "g0": 32,
        "g1": 40,
        "tokens": 100,
        "shares": {"data": 20},
        "tokens_hash": 2**63 + 5,
        "flops_causal": 50_000.0,
        "flops_full": 60_000.0,
        "flops_6nd": 40_000.0,
        "loss": (1 / 3 + 1 / 7) / 20,
        "grad_norm": 2.0,
        "applied": True,
        "learning_rate": {"muon": 0.01, "decayed": 0.002},
        "tokens_per_second": 80.0,
        "mfu": 600 * 80 / 1e6,
        "memory_bytes": 4096,
    }


def test_extra_numbers_are_a_key_each(metrics):
    new = metrics()
    new.see(step(5), replace(summary(5), extra={"entropy": 0.25, "routed": 3.0}))
    (row,) = read_rows(new.attempt.metrics.path)
    assert (row["extra.entropy"], row["extra.routed"]) == (0.25, 3.0)
    assert new.trackers[0].rows[0][1]["train/extra.entropy"] == 0.25


def test_a_dropped_update_is_an_event(metrics):
    new = metrics()
    new.see(step(1), summary(1))
    new.see(step(2, applied=False, norm=math.inf), summary(2))
    (event,) = read_rows(new.attempt.events.path)
    assert (event["kind"], event["step"]) == ("update_dropped", 2)
    rows = read_rows(new.attempt.metrics.path)
    assert [row["applied"] for row in rows] == [True, False]
    assert math.isnan(rows[1]["grad_norm"])
    assert '"grad_norm": null' in new.attempt.metrics.path.read_text()  # JSON knows no infinity


def test_the_reason_of_a_decision_is_logged(metrics, capsys):
    new = metrics()
    new.see(replace(step(1), decision=Decision("note", "the loss is odd")), summary(1))
    anomalous = replace(step(2, applied=False), decision=Decision("skip", "the loss is worse"))
    new.see(anomalous, summary(2))
    events = [(e["kind"], e["step"], e["reason"]) for e in read_rows(new.attempt.events.path)]
    assert events == [
        ("spike_noted", 1, "the loss is odd"),
        ("update_dropped", 2, "the loss is worse"),
    ]
    assert "the update was dropped: the loss is worse" in capsys.readouterr().out


def test_a_damaged_member_is_reported_once(metrics, capsys):
    new = metrics()
    for t in (1, 2):
        lost = replace(step(t), position=Position(t, 8 * t, 20 * t, (), (("web", 3, "000001"),)))
        new.see(lost, summary(t))
    (event,) = read_rows(new.attempt.events.path)
    assert (event["kind"], event["step"]) == ("member_quarantined", 1)
    assert (event["source"], event["shard"], event["member"]) == ("web", 3, "000001")
    assert capsys.readouterr().out.count("Damaged: member 000001 of shard 3 of web") == 1
    rows = read_rows(new.attempt.metrics.path)
    assert rows[1]["quarantined"] == [["web", 3, "000001"]]


def test_a_validation_row_and_its_line(metrics, capsys):
    new = metrics()
    new.scored(step(7).position, {"validation": Score(2.5, 0.125, 1.75, 1000, 2000, 1234)})
    (row,) = read_rows(new.attempt.metrics.path)
    assert row["kind"] == "validation"
    assert (row["step"], row["tokens"], row["dataset"]) == (7, 140, "validation")
    assert (row["loss"], row["loss_stderr"], row["bits_per_byte"]) == (2.5, 0.125, 1.75)
    line = "step 7: validation loss 2.5000 ± 0.1250, 1.7500 bits per byte over 1,234 windows\n"
    assert capsys.readouterr().out == line


def test_abilities_stand_in_the_row_of_all_held_out_text(metrics, capsys):
    new, score = metrics(), Score(2.5, 0.125, 1.75, 1000, 2000, 1234)
    able = [Accuracy("copy", 0, 4, 8, 1.5, 0.25), Accuracy("copy", 4, 6, 8, 0.5, 0.125)]
    columns = able[0].columns | able[1].columns
    new.scored(step(7).position, {"web": score, "validation": score}, columns)
    web, together = read_rows(new.attempt.metrics.path)
    assert not [name for name in web if "/" in name]
    assert (together["ability/copy/4"], together["ability/copy/4_nats"]) == (0.75, 0.5)
    line = "step 7: right answers after 0, 4 examples: copy 50 %, 75 %\n"
    assert capsys.readouterr().out.endswith(line)
    assert new.trackers[0].rows[1][1]["validation/ability/copy/0"] == 0.5


def test_an_empty_split_is_printed_and_an_event(metrics, capsys):
    new = metrics()
    new.scored(step(7).position, {"web": Score(math.nan, math.nan, math.nan, 0, 0, 0)})
    assert not new.attempt.metrics.path.exists()
    assert [row["kind"] for row in read_rows(new.attempt.events.path)] == ["nothing_to_validate"]
    assert "web has no held-out text" in capsys.readouterr().out


def test_a_sink_gets_numbers_by_flat_names(metrics):
    new = metrics()
    new.see(step(5), summary(5))
    new.scored(step(5).position, {"validation": Score(2.5, 0.125, 1.75, 1000, 2000, 1234)})
    (first, train), (second, validation) = new.trackers[0].rows
    assert first == second == 5
    assert train["train/loss"] == 4.0
    assert train["train/learning_rate/muon"] == 0.01
    assert train["train/seconds/data"] == 0.05
    assert validation["validation/bits_per_byte"] == 1.75
    assert all(isinstance(v, int | float) for v in (train | validation).values())
    assert "train/step" not in train


def test_other_ranks_write_and_print_nothing(metrics, capsys):
    new = metrics(is_main=False)
    new.see(step(5), summary(5))
    new.scored(step(5).position, {"validation": Score(2.5, 0.125, 1.75, 1000, 2000, 1234)})
    assert not new.attempt.metrics.path.exists()
    assert new.trackers[0].rows == []
    assert capsys.readouterr().out == ""


def test_plain_lines_come_at_their_interval(metrics, capsys):
    new = metrics("10 steps")
    for t in range(1, 32):
        new.see(step(t), summary(t))
    first, *lines = capsys.readouterr().out.splitlines()
    # Of the steps after the first one, which compiles.
    assert first.startswith(f"This run needs {span((TOTAL - 4) * 1.25)} more here")
    assert [line.split("/")[0] for line in lines] == ["step   10", "step   20", "step   30"]
    # 20 tokens in the 1.25 seconds that a step takes with all that belongs to it.
    eta = clock((TOTAL - 30) * 1.25)
    mfu = 600 * 16 / 1e6
    assert lines[-1] == (
        "step   30/1954 (  1.5%) | loss 4.0000 | lr 1.0e-02 | norm 2 | 16 tokens/s | "
        f"mfu {mfu:.1%} | eta {eta}"
    )


def test_speed_and_time_left_are_of_steps_without_evaluations_and_saves(metrics, capsys):
    new = metrics("10 steps")
    for t in range(1, 11):
        one = step(t)
        beside = {"startup": 90.0} if t == 1 else {"evaluation": 500.0, "checkpoint": 50.0}
        new.see(replace(one, seconds=one.seconds | beside), summary(t))
    eta = clock((TOTAL - 10) * 1.25)
    line = capsys.readouterr().out
    assert "| 16 tokens/s |" in line
    assert line.endswith(f"| eta {eta}\n")


def test_the_first_line_has_no_estimate_yet(metrics, capsys):
    new = metrics("1 steps")
    new.see(step(1), summary(1))
    assert capsys.readouterr().out == (
        "step    1/1954 (  0.1%) | loss 4.0000 | lr 1.0e-02 | norm 2 | 80 tokens/s | mfu 4.8% | "
        "eta --:--\n"
    )


def test_the_live_line_fits_a_terminal_of_80_columns(metrics, capsys, monkeypatch):
    from forescale.train import metrics as module

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    new = metrics("10 steps")
    assert module.sys.stdout.isatty()
    for t in (1, 2, 1953):
        new.see(step(t, seconds=1 / 3000), summary(t))
    new.line.print("above the line")
    new.line.close()
    new.line.close()  # twice does no harm
    out = capsys.readouterr().out
    assert "above the line" in out
    frames = [f for f in out.replace("\r", "\n").split("\n") if "1953/1954" in f]
    assert frames
    for frame in frames:
        assert re.search(r"\| lr 1.0e-02 \| norm 2 \| .* \| eta 0:0\d", frame), "the end is cut off"


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (99, "step  400/1954 ( 20.5%) | loss 4.0000 | lr 1.0e-02 | norm 0.123 | 24,440 tokens/s | "
             "eta 0:01"),
        (85, "step  400/1954 | loss 4.0000 | lr 1.0e-02 | norm 0.123 | 24,440 tokens/s | eta 0:01"),
        (80, " 400/1954 | loss 4.0000 | lr 1.0e-02 | norm 0.12 | 24.4k tokens/s | eta 0:01"),
        (60, " 400/1954 | loss 4.000 | 24.4k tokens/s | eta 0:01"),
    ],
)  # fmt: skip
def test_what_the_line_leaves_out_where_there_is_no_room(metrics, width, text):
    """Learning rate and norm are there on the common terminal of 80 columns."""
    line = metrics().line
    line._recent.append(20 / 24_440)
    row = {"step": 400, "tokens": 8000, "loss": 4.0, "grad_norm": 0.1234}
    row |= {"learning_rate": {"muon": 0.01, "decayed": 0.002}, "tokens_per_second": 1.0}
    assert line._text(row, 0.0, width) == text


@pytest.mark.parametrize(
    ("number", "text"), [(7.4, "7"), (999.4, "999"), (999_999, "1M"), (1_234_567, "1.23M")]
)
def test_short_numbers(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (4.4, "0:04"),
        (59.6, "1:00"),
        (245, "4:05"),
        (3599.6, "1:00:00"),
        (7389, "2:03:09"),
        (400_000, "111:06:40"),
        (math.inf, "--:--"),
        (math.nan, "--:--"),
    ],
)
def test_clock(seconds, text):
    assert clock(seconds) == text
