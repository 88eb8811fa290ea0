"""The order in which each stage of a pipeline computes its micro-batches, sends and receives.

- 1f1b: after a warm-up of forward passes, one forward and one backward pass in turns, so that a
  stage holds the activations of as many micro-batches as there are stages behind it (Narayanan et
  al. 2021, arXiv 2104.04473, section 2.2).
- interleaved: the same with several parts a stage, which are as many times shorter to fill and to
  empty (the same section), but for any number of micro-batches.
- zero-bubble: as 1f1b, with a backward pass in two: first the gradient of the input, for which the
  stage before waits; the gradients of weights where the stage would wait itself, or would hold
  more than the first stage of 1f1b does (Qi et al. 2024, arXiv 2401.10241, ZB-H1).

torch.distributed.pipelining has these orders too; they need at least as many micro-batches as
stages, a whole number of rounds of them, and its own stages, in which each micro-batch has the
same shapes and no seed of its own.

Invariant: the sends and receives of two ranks with each other have the same order on both, so that
no two wait for each other: all ranks simulate the same pipeline. Imports no torch.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

# The time of a pass of one micro-batch through one part, in forward passes. I and W: the gradients
# of inputs and of weights; B: both at once.
TIMES = {"F": 1, "B": 2, "I": 1, "W": 1}


class Action(NamedTuple):
    """kind: F, B, I, W as in TIMES; "send" (what `part` has computed) and "get" (what it reads): of
    a forward or a backward pass, `of` F or B."""

    kind: str
    part: int
    micro: int
    of: str = ""


@dataclass
class Order:
    """What each of the stages does, in order; and the length of the step, in forward passes of a
    part."""

    actions: list[list[Action]]
    length: int

    @property
    def bubble(self) -> float:
        """The share of the step in which a stage waits, over all of them, if parts cost the same
        and nothing is sent."""
        busy = sum(TIMES.get(action.kind, 0) for each in self.actions for action in each)
        return 1 - busy / (self.length * len(self.actions))

    def in_flight(self, stage: int) -> int:
        """Return of how many micro-batches at most a stage holds the activations of a part."""
        most = now = 0
        last = "W" if any(action.kind == "W" for action in self.actions[stage]) else "B"
        for action in self.actions[stage]:
            now += (action.kind == "F") - (action.kind == last)
            most = max(most, now)
        return most


@dataclass
class _Stage:
    """A stage in the simulation. passes: forward and backward ones still to come; weights: whose
    gradients of weights are; limit: of micro-batches in flight; clock: when it is free."""

    passes: list[Action]
    limit: int
    weights: list[Action] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    arrived: dict[Action, int] = field(default_factory=dict)
    clock: int = 0
    in_flight: int = 0

    def next(self, last: int) -> tuple[int, Action] | None:
        """Return what it does next, and when; None: it waits for something that isn't sent yet."""
        if not self.passes:
            return (self.clock, self.weights[0]) if self.weights else None
        action = self.passes[0]
        if self.weights and action.kind == "F" and self.in_flight >= self.limit:
            return self.clock, self.weights[0]
        start = self.arrived.get(action, self.clock if _needs_nothing(action, last) else None)
        if self.weights and (start is None or start > self.clock):
            return self.clock, self.weights[0]
        return None if start is None else (max(start, self.clock), action)


def _needs_nothing(action: Action, last: int) -> bool:
    return action.part == (0 if action.kind == "F" else last)


@cache
def order_of(schedule: str, stages: int, chunks: int, micros: int) -> Order:
    """Return the order of a step of `micros` micro-batches a rank, in a pipeline of so many stages
    with `chunks` parts each. stages: at least 2, so that no stage sends to itself."""
    backward = "I" if schedule == "zero-bubble" else "B"
    passes = [passes_of(stage, stages, chunks, micros, backward) for stage in range(stages)]
    every = [_Stage(of_stage, stages) for of_stage in passes]
    last, length = stages * chunks - 1, 0
    nexts = [stage.next(last) for stage in every]
    while any(nexts):
        start, i = min((step[0], i) for i, step in enumerate(nexts) if step)
        action, stage = nexts[i][1], every[i]  # type: ignore[index]
        (stage.weights if action.kind == "W" else stage.passes).pop(0)
        stage.actions.append(action)
        stage.clock = start + TIMES[action.kind]
        length = max(length, stage.clock)
        stage.in_flight += (action.kind == "F") - (action.kind in "BW")
        kind, part, micro, _ = action
        if kind == "I":
            stage.weights.append(Action("W", part, micro))
        following = part + 1 if kind == "F" else part - 1
        if kind != "W" and 0 <= following <= last:
            other = every[following % stages]
            other.arrived[Action(kind, following, micro)] = stage.clock
            of = "F" if kind == "F" else "B"
            stage.actions.append(Action("send", part, micro, of))
            other.actions.append(Action("get", following, micro, of))
            nexts[following % stages] = other.next(last)
        nexts[i] = stage.next(last)
    assert not any(stage.passes for stage in every), "stages wait for each other"
    return Order([stage.actions for stage in every], length)


def passes_of(stage: int, stages: int, chunks: int, micros: int, backward: str) -> list[Action]:
    """Return the forward and backward passes of a stage in their order: some forward ones, then in
    turns, then the rest of the backward ones."""
    # Micro-batches that pass one part before the next: as many as stages, or up to twice as many.
    count = max(1, micros // stages)
    rounds = [range(micros * r // count, micros * (r + 1) // count) for r in range(count)]
    forward = [
        Action("F", chunk * stages + stage, m) for r in rounds for chunk in range(chunks) for m in r
    ]
    back = [
        Action(backward, chunk * stages + stage, m)
        for r in rounds
        for chunk in reversed(range(chunks))
        for m in r
    ]
    behind = stages - 1 - stage
    ahead = behind if chunks == 1 else 2 * behind + (chunks - 1) * max(map(len, rounds))
    ahead = min(ahead, len(forward))
    passes = forward[:ahead]
    for i, action in enumerate(back):
        passes += [*forward[ahead + i : ahead + i + 1], action]
    return passes
