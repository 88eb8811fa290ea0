"""What is due when, seen through the real loop with a counting engine in place of DeepSpeed."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forescale.checkpoint.writer import Position
from forescale.config.duration import Duration
from forescale.engine.step import Facts
from forescale.engine.world import World
from forescale.errors import UserError
from forescale.resilience.phases import Pulse
from forescale.run.directory import Run
from forescale.train.callbacks import Checkpoints, Every, Validation
from forescale.train.evaluate import Score
from forescale.train.guard import HEALTHY
from forescale.train.loop import train


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

    def train_step(self, batch, rate, may_apply, before_update):
        before_update(batch, torch.tensor([1.0]))
        applied = may_apply(1.0, 1.0)
        self.made += applied
        return Facts(torch.tensor([1.0]), 1.0, applied)


class Healthy:
    """A watch that finds nothing."""

    verdict = HEALTHY

    def begin(self, batch): ...

    def before_update(self, batch, losses): ...

    def may_apply(self, loss, norm):
        return True

    def end(self): ...


@dataclass
class Recorder:
    """A part that, like those of the product, acts where its Every is due."""

    is_due: Every
    engine: Engine
    phase: str = "test"
    failed: bool = False
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
    where = train(engine, batches(total), lambda t: 1.0, parts, Position(), pulse, asked, Healthy())
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
    watcher = SimpleNamespace(phase="watch", failed=False, is_due=lambda step: step in (2, 5, 6))
    watcher.see = lambda step, word: seen.append((step.position.step, word.step))
    train(
        Engine(),
        batches(9),
        lambda t: 1.0,
        [watcher],
        Position(),
        Pulse("s"),
        lambda: False,
        Healthy(),
    )
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
    train(
        engine, batches(10), lambda t: 1.0, [part], Position(), Pulse("s"), lambda: False, Healthy()
    )
    assert asked == [False, False, True]
    assert told == [(4, score), (8, score), (10, score)]


class Saves:
    """In place of a Saver: what was begun; and a fault of what goes on behind, where given."""

    def __init__(self, fault=None):
        self.begun, self.fault, self.failed = [], fault, False

    def begin(self, position):
        self.begun.append(position)
        self.failed = self.fault is not None

    def finish(self):
        if self.failed:
            raise self.fault


def save_along(tmp_path, monkeypatch, total, saves):
    """Train `total` steps with a part that saves every 4."""
    run, engine = Run(tmp_path), Engine()
    monkeypatch.setattr("forescale.train.callbacks.Saver", lambda *_: saves)
    part = Checkpoints(Every(Duration(4), 4, total), 2, run, run.new_attempt(), engine, dict)
    train(
        engine,
        batches(total),
        lambda t: 1.0,
        [part],
        Position(),
        Pulse("s"),
        lambda: False,
        Healthy(),
    )
    return part


def test_a_step_is_saved_once(tmp_path, monkeypatch):
    saves = Saves()
    part = save_along(tmp_path, monkeypatch, 8, saves)
    assert part.saved == 8
    part.save(saves.begun[-1])  # as at the end of every run
    assert [(p.step, p.g) for p in saves.begun] == [(4, 4), (8, 8)]
    part.save(Position(8, 9))  # the run went back, and came to the step by another way
    assert len(saves.begun) == 3


def test_a_save_that_fails_behind_the_training_ends_it_with_the_next_word(tmp_path, monkeypatch):
    fault = UserError("disk", "full", "free some space")
    saves = Saves(fault)
    with pytest.raises(UserError, match="disk: full"):
        save_along(tmp_path, monkeypatch, 100, saves)
    assert [p.step for p in saves.begun] == [4]


def test_steps_that_are_named_are_due_too():
    every = Every(Duration(4), 4, 10, at=(3, 7))
    assert [step for step in range(1, 11) if every(step)] == [3, 4, 7, 8, 10]
