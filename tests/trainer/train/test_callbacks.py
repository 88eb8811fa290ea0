"""What is due when, seen through the real loop with a counting engine in place of DeepSpeed."""

import gc
import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forescale.checkpoint.reader import Position
from forescale.config.duration import Duration
from forescale.config.sections.batch import Cadence
from forescale.engine.step import Facts
from forescale.engine.world import StepSummary, World
from forescale.ground.errors import UserError
from forescale.resilience.phases import PhaseTimer
from forescale.train.build import Parts
from forescale.train.callbacks import Checkpoints, Every, UserCallback, Validation
from forescale.train.evaluate import Score
from forescale.train.guard import HEALTHY, Halt, Rollback
from forescale.train.loop import train


class Clock(World):
    """A world of one whose clock says how many steps were made."""

    def __init__(self, per_step=1.0):
        super().__init__(SimpleNamespace(process_index=0, num_processes=1, device="cpu"))
        self.per_step = per_step

    def summaries(self, behind):
        for summary in super().summaries(behind):
            yield replace(summary, seconds=summary.step * self.per_step)


@dataclass
class Engine:
    """Its weights are the number of updates that were made."""

    world: World = field(default_factory=Clock)
    steps_made: int = 0

    def train_step(self, batch, rate, may_apply, before_update, decay):
        before_update(batch, torch.tensor([1.0]))
        applied = may_apply(1.0, 1.0)
        self.steps_made += applied
        return Facts(torch.tensor([1.0]), 1.0, applied)


class Healthy:
    """A guard that finds nothing."""

    decision = HEALTHY

    def begin(self, batch): ...

    def before_update(self, batch, losses): ...

    def may_apply(self, loss, norm):
        return True

    def end(self): ...


@dataclass
class Recorder:
    """A callback that, like those of the product, acts if its Every is due."""

    is_due: Every
    engine: Engine
    phase: str = "test"
    failed: bool = False
    acted: list = field(default_factory=list)  # (step, what the weights were at)

    def see(self, step, summary):
        if self.is_due.update(step.position.step, summary):
            self.acted.append((step.position.step, self.engine.steps_made))


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
            micro_batches=1,
            quarantine=frozenset(),
        )


def trained(engine, total, callbacks, stops=lambda: False):
    """What the loop returns after `total` healthy steps at a rate of 1 with these callbacks."""
    timer = PhaseTimer("startup")
    return train(
        engine, batches(total), lambda t: (1.0, 1.0), callbacks, Position(), timer, stops, Healthy()
    )


def run_loop(total, *lengths, stop_at=None, per_step=1.0):
    engine = Engine(Clock(per_step))
    callbacks = []
    for length in map(Duration.parse, lengths):
        steps = length.steps(10, total)
        every = Every(Cadence(steps) if steps else None, total, seconds=length.seconds)
        callbacks.append(Recorder(every, engine))
    stops = (lambda: engine.steps_made >= stop_at) if stop_at else (lambda: False)
    where = trained(engine, total, callbacks, stops)
    return where, [callback.acted for callback in callbacks], engine


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
    """One until its summary is read, and one so that all ranks are ready for it."""
    _, (acted,), _ = run_loop(20, "5 s")
    assert [step for step, _ in acted] == [7, 14, 20]


@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_runs_between_steps_alone_and_every_hundred(monkeypatch, fails):
    engine, collected, enabled = Engine(), [], set()
    monkeypatch.setattr(gc, "collect", lambda: collected.append(engine.steps_made))
    real_step = engine.train_step

    def train_step(*arguments):
        enabled.add(gc.isenabled())
        if fails and engine.steps_made == 150:
            raise RuntimeError("a fault")
        return real_step(*arguments)

    engine.train_step = train_step
    with pytest.raises(RuntimeError, match="a fault") if fails else nullcontext():
        trained(engine, 250, [])
    assert (enabled, collected) == ({False}, [100] if fails else [100, 200])
    assert gc.isenabled()
    assert not gc.get_freeze_count()


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from(["steps", "s", "tokens", "%"])),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 30),
    st.sampled_from([0.3, 1.0, 4.0]),
)
def test_a_callback_that_is_due_sees_the_weights_of_its_step(lengths, total, per_step):
    """Otherwise a checkpoint would have another step's weights than its name says."""
    texts = [f"{n} {unit}" for n, unit in lengths]
    _, acted, _ = run_loop(total, *texts, per_step=per_step)
    for callback in acted:
        assert all(step == weights for step, weights in callback)
        assert callback[-1][0] == total
        assert len({step for step, _ in callback}) == len(callback)


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_stop_request_ends_training_within_a_step_at_the_position_of_the_weights(total, stop_at):
    (position, stopped), (acted,), engine = run_loop(total, "3 steps", stop_at=stop_at)
    assert position.step == engine.steps_made
    assert engine.steps_made <= min(total, stop_at + 1)
    assert stopped or engine.steps_made == total
    assert all(step == weights for step, weights in acted)


def test_every_step_is_seen_once_and_in_order_whatever_is_due():
    steps = []
    watcher = SimpleNamespace(phase="test", failed=False, is_due=lambda step: step in (2, 5, 6))
    watcher.see = lambda step, summary: steps.append((step.position.step, summary.step))
    trained(Engine(), 9, [watcher])
    assert steps == [(t, t) for t in range(1, 10)]


def test_the_periodic_score_is_capped_and_the_last_is_complete():
    requests, logged = [], []
    engine = Engine()
    score = Score(1.0, 0.1, 2.0, 10, 20, 3)
    callback = Validation(
        Every(Cadence(4), 10),
        lambda complete: requests.append(complete) or score,
        lambda position, scores, able: logged.append((position.step, scores, able)),
        lambda: [engine.steps_made],
    )
    trained(engine, 10, [callback])
    assert requests == [False, False, True]
    assert logged == [(4, score, [4]), (8, score, [8]), (10, score, [10])]


def test_a_step_is_saved_before_it_is_scored_and_after_all_else_has_seen_it():
    """An evaluation can take an hour; nothing before it may be lost with it."""
    engine, acted = Engine(), []

    class Noted(Recorder):
        def see(self, step, summary):
            if self.is_due.update(step.position.step, summary):
                acted.append((self.phase, step.position.step))

    def each(name):
        return Noted(Every(Cadence(2), 4), engine, name)

    parts = Parts(None, None, each("row"), each("score"), [each("own")], each("save"))
    trained(engine, 4, parts.callbacks)
    order = ["row", "own", "save", "score"]
    assert acted == [(name, step) for step in (2, 4) for name in order]


class Saves:
    """In place of a Saver: records what was begun, and fails in the background if given a fault."""

    def __init__(self, fault=None):
        self.begun, self.fault, self.failed = [], fault, False

    def begin(self, position):
        self.begun.append(position)
        self.failed = self.fault is not None

    def finish(self):
        if self.failed:
            raise self.fault


def save_along(total, saves):
    """Train `total` steps with a callback that saves every 4."""
    callback = Checkpoints(Every(Cadence(4), total), saves)
    trained(Engine(), total, [callback])
    return callback


def test_a_step_is_saved_once():
    saves = Saves()
    callback = save_along(8, saves)
    assert callback.saved == 8
    callback.save(saves.begun[-1])  # as at the end of every run
    assert [(p.step, p.g) for p in saves.begun] == [(4, 4), (8, 8)]
    callback.save(Position(8, 9))  # after a rollback the run came to the step by another way
    assert len(saves.begun) == 3


def test_a_save_that_fails_in_the_background_ends_training_at_the_next_summary():
    fault = UserError("disk", "full", "free some space")
    saves = Saves(fault)
    with pytest.raises(UserError, match="disk: full"):
        save_along(100, saves)
    assert [p.step for p in saves.begun] == [4]


def test_named_steps_are_due_too():
    every = Every(Cadence(4), 10, at=(3, 7))
    assert [step for step in range(1, 11) if every(step)] == [3, 4, 7, 8, 10]


class Raises:
    """A callback that raises at one step."""

    phase, failed = "test", False

    def __init__(self, step, error):
        self.step, self.error, self.seen = step, error, []

    def is_due(self, step):
        return False

    def see(self, step, summary):
        self.seen.append(summary.step)
        if summary.step == self.step:
            raise self.error


def test_after_an_anomaly_of_a_callback_the_steps_made_are_logged_and_nothing_is_saved():
    engine, first, last = Engine(), Raises(None, None), Raises(None, None)
    raises = Raises(4, Rollback(4, "the loss is odd", 2, None))
    callbacks = [first, raises, last]
    with pytest.raises(Rollback) as caught:
        trained(engine, 9, callbacks)
    assert caught.value.position.step == engine.steps_made == 5, "the summary is read one step late"
    assert first.seen == [1, 2, 3, 4, 5], "every step has its row"
    assert raises.seen == [1, 2, 3, 4]
    assert last.seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "left", "kind", "reason"),
    [
        (Halt(3, "enough"), 1, "halt", "enough"),
        (Rollback(3, "odd", 1, None), 1, "rollback", "odd"),
        (Rollback(3, "odd", 1, None), 0, "halt", "odd, and the run may not roll back any more"),
    ],
)
def test_a_callback_of_the_users_own_leaves_an_event_before_it_ends_the_attempt(
    error, left, kind, reason
):
    events = []
    callback = UserCallback(
        Raises(3, error), lambda kind, **facts: events.append((kind, facts)), left
    )
    summaries = [StepSummary(t, [1.0], 0, False, False, 0.0) for t in (2, 3)]
    callback.see(None, summaries[0])
    with pytest.raises(Halt if kind == "halt" else Rollback):
        callback.see(None, summaries[1])
    assert events == [(kind, {"step": 3, "reason": reason})]


def test_extra_numbers_arrive_as_means_by_their_names():
    world = Clock()
    world.share(1, torch.tensor([2.0]), 0, 1, 7, False, extra={"a": torch.tensor(0.5), "b": 3})
    (summary,) = world.summaries(0)
    assert (summary.losses, summary.extra) == ([2.0], {"a": 0.5, "b": 3.0})
    with pytest.raises(UserError, match="the names: are b, and were a, b"):
        world.share(2, torch.tensor([2.0]), 0, 1, 7, False, extra={"b": 1.0})


def test_losses_of_many_micro_batches_arrive_as_their_exact_sum():
    """Huge and tiny ones, of both signs, in any order, at any place; and such as a run has."""
    drawn = torch.Generator().manual_seed(1)
    powers = torch.randint(-149, 127, (5000,), generator=drawn).double()
    wild = (torch.randn(5000, generator=drawn) * 2.0**powers).float()
    wild = torch.cat([wild, -wild[:4000].flip(0), torch.tensor([3e38, 1e-45, -3e38, 0.0])])
    usual = torch.rand(9004, generator=drawn) * 5e4 + 1.0
    world = Clock()

    def summed(losses, first=0):
        world.share(1, losses, first, 10_000, 7, True, extra={"a": 1.0})
        (summary,) = world.summaries(0)
        assert (summary.tokens_hash, summary.stop, summary.extra) == (7, True, {"a": 1.0})
        (loss,) = summary.losses
        return loss

    for losses in (wild, usual):
        shuffled = losses[torch.randperm(len(losses), generator=drawn)]
        assert summed(losses) == summed(shuffled, 99) == math.fsum(losses.tolist())
    assert summed(usual) == sum(usual.tolist()), "as added in order, where that rounds nothing"
    assert summed(torch.tensor([1.0, math.inf, 2.0])) == math.inf
    assert math.isnan(summed(torch.tensor([1.0, math.nan])))
