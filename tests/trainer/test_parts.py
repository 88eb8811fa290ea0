"""What is due when, seen through the real loop with a counting engine in place of DeepSpeed."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint import Position
from trainer.duration import Duration
from trainer.engine.step import Facts
from trainer.engine.world import World
from trainer.evaluate import Score
from trainer.loop import train
from trainer.parts import Checkpoints, Every, Validation
from trainer.pulse import Pulse
from trainer.run import Parent, Run, read_rows


class Clock(World):
    """A world of one whose clock says how many steps were made."""

    def __init__(self, per_step=1.0):
        super().__init__(SimpleNamespace(process_index=0, num_processes=1, device="cpu"))
        self.per_step = per_step

    def words(self, behind):
        for word in super().words(behind):
            yield type(word)(**{**vars(word), "seconds": word.step * self.per_step})


@dataclass
class Engine:
    """Its weights are the number of updates that were made."""

    world: World = field(default_factory=Clock)
    made: int = 0

    def train_step(self, batch, rate):
        self.made += 1
        return Facts(torch.tensor([1.0]), 1.0, True)


@dataclass
class Recorder:
    """A part that, like those of the product, acts where its Every is due."""

    is_due: Every
    engine: Engine
    phase: str = "test"
    acted: list = field(default_factory=list)  # (step, what the weights were at)

    def see(self, step, word):
        if self.is_due.hear(step.position.step, word):
            self.acted.append((step.position.step, self.engine.made))


def batches(total, first=0):
    for t in range(first, total):
        yield SimpleNamespace(
            step=t,
            g0=t,
            g1=t + 1,
            targets=10,
            shares={"data": 10},
            window_hash=1,
            micro=[SimpleNamespace(index=0)],
            quarantine=frozenset(),
        )


def run_loop(total, *lengths, stop_at=None, per_step=1.0):
    engine = Engine(Clock(per_step))
    parts = []
    for length in map(Duration.parse, lengths):
        every = Every(length, length.steps(10, total), total)
        parts.append(Recorder(every, engine))
    asked = (lambda: engine.made >= stop_at) if stop_at else (lambda: False)
    pulse = Pulse("startup")
    where = train(engine, batches(total), lambda t: 1.0, parts, Position(), pulse, asked)
    return where, [part.acted for part in parts], engine


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ("4 steps", [4, 8, 10]),
        ("40 tokens", [4, 8, 10]),
        ("35 tokens", [4, 8, 10]),  # rounded up to whole steps
        ("30 %", [3, 6, 9, 10]),
        ("100 steps", [10]),
        ("5 steps", [5, 10]),
    ],
)
def test_counted_lengths_are_exact(length, steps):
    (position, stopped), (acted,), _ = run_loop(10, length)
    assert (position.step, position.tokens, stopped) == (10, 100, False)
    assert [step for step, _ in acted] == steps


def test_a_wall_time_is_due_two_steps_after_the_clock_says_so():
    """One, until its word is read, and one, so that all ranks are ready for it."""
    _, (acted,), _ = run_loop(20, "5 s")
    assert [step for step, _ in acted] == [7, 14, 20]


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from(["steps", "s", "tokens", "%"])),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 30),
    st.sampled_from([0.3, 1.0, 4.0]),
)
def test_who_acts_on_a_step_finds_the_weights_of_that_step(lengths, total, per_step):
    """Or a checkpoint would be named after another step than its weights are of."""
    texts = [f"{n} {unit}" for n, unit in lengths]
    _, acted, _ = run_loop(total, *texts, per_step=per_step)
    for part in acted:
        assert all(step == weights for step, weights in part)
        assert part[-1][0] == total
        assert len({step for step, _ in part}) == len(part)


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_wish_to_stop_ends_all_within_a_step_where_the_weights_are(total, stop_at):
    (position, stopped), (acted,), engine = run_loop(total, "3 steps", stop_at=stop_at)
    assert position.step == engine.made
    assert engine.made <= min(total, stop_at + 1)
    assert stopped or engine.made == total
    assert all(step == weights for step, weights in acted)


def test_every_step_is_told_once_in_order_whatever_is_due():
    seen = []
    watcher = SimpleNamespace(phase="watch", is_due=lambda step: step in (2, 5, 6))
    watcher.see = lambda step, word: seen.append((step.position.step, word.step))
    train(Engine(), batches(9), lambda t: 1.0, [watcher], Position(), Pulse("s"), lambda: False)
    assert seen == [(t, t) for t in range(1, 10)]


def test_the_periodic_score_is_capped_and_the_last_is_whole():
    asked, told = [], []
    engine = Engine()
    score = Score(1.0, 0.1, 2.0, 10, 20, 3)
    part = Validation(
        Every(Duration(4), 4, 10),
        lambda whole: asked.append(whole) or score,
        lambda step, found: told.append((step.position.step, found)),
    )
    train(engine, batches(10), lambda t: 1.0, [part], Position(), Pulse("s"), lambda: False)
    assert asked == [False, False, True]
    assert told == [(4, score), (8, score), (10, score)]


def test_a_step_is_saved_once_and_the_events_say_what_went(tmp_path, monkeypatch):
    run = Run(tmp_path)
    attempt = run.new_attempt()
    attempt.start_from(Parent(0), run)
    saved = []
    monkeypatch.setattr(
        "trainer.checkpoint.save", lambda r, a, position, *_: saved.append(position)
    )
    monkeypatch.setattr("trainer.checkpoint.retain", lambda r, a, keep: [saved[-1].step - 4])
    engine = Engine()
    part = Checkpoints(Every(Duration(4), 4, 8), 2, run, attempt, engine, {})
    train(engine, batches(8), lambda t: 1.0, [part], Position(), Pulse("s"), lambda: False)
    part.save(saved[-1])  # as at the end of every run
    assert [p.step for p in saved] == [4, 8]
    assert [p.g for p in saved] == [4, 8]
    rows = [(row["kind"], row["step"]) for row in read_rows(run.events)]
    assert rows == [
        *(("checkpoint_saved", 4), ("checkpoint_deleted", 0)),
        *(("checkpoint_saved", 8), ("checkpoint_deleted", 4)),
    ]
