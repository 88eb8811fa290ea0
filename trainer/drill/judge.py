"""Judge a run with injected faults: did it survive, at what cost, who noticed, and how fast.

Invariant: the judgement uses only the run's files and its commands' output, in comparison with a
run without faults. Without evidence, a scenario counts as not survived.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from forescale.drill.scenarios import Scenario
from forescale.ground.errors import USER
from forescale.monitor.status import Status
from forescale.resilience.injector import records
from forescale.run.directory import Run

_DATA = ("step", "g0", "g1", "tokens", "tokens_hash")
_ROW = (*_DATA, "loss", "grad_norm")
_STEP_LINE = re.compile(r"step +(\d+)/")  # of the progress
Row = dict[str, Any]
Interval = tuple[int, int]


@dataclass(frozen=True)
class Line:
    """A line of output or an event, with its time (seconds since the epoch)."""

    time: float
    text: str


@dataclass(frozen=True)
class Command:
    """One `forescale train` command, from its start to its end.

    code: exit code; None if it was killed at the time limit; lines: output; torn: a sentence for
    each checkpoint that was damaged after its end.
    """

    code: int | None
    began: float
    ended: float
    lines: Sequence[Line]
    torn: Sequence[str] = ()

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class Evidence:
    """A run and its commands. signalled: time of the SIGTERM, if it got one."""

    run: Run
    commands: Sequence[Command]
    signalled: float | None = None

    @property
    def seconds(self) -> float:
        return sum(c.seconds for c in self.commands)

    @property
    def rows(self) -> list[Row]:
        """The rows of the steps that count: without those that were rolled back or repeated."""
        return Status(self.run).train

    @property
    def compute(self) -> float:
        """Seconds of computing in the steps that count."""
        return sum(row["seconds"].get("compute", 0.0) for row in self.rows)

    @property
    def step_times(self) -> dict[int, float]:
        """The time of each step's last output line."""
        lines = [line for c in self.commands for line in c.lines]
        matches = ((_STEP_LINE.match(line.text), line.time) for line in lines)
        return {int(match[1]): time for match, time in matches if match}

    def lines(self) -> list[Line]:
        """Return output lines and events by time; an event as its kind and its JSON."""
        events = self.run.read_events()
        rows = [Line(row["time"], f"{row['kind']} {json.dumps(row)}") for row in events]
        return sorted([*rows, *(t for c in self.commands for t in c.lines)], key=lambda t: t.time)


@dataclass(frozen=True)
class Judgement:
    """The result of a scenario.

    wrong: reasons why it was not survived; steps: lost steps; seconds: time from the first fault to
    the last step, minus the time of a run without faults for the same steps; noticed: seconds from
    the first fault until `by` noticed it.
    """

    name: str
    title: str
    wrong: list[str]
    steps: int = 0
    seconds: float = 0.0
    noticed: float | None = None
    by: str | None = None
    compute: float = field(default=0.0, repr=False)
    wall: float = field(default=0.0, repr=False)

    @property
    def survived(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        if self.wrong:
            return f"NOT survived: {'; '.join(self.wrong)}."
        lost = f"{self.steps} step{'s' * (self.steps != 1)} and {self.seconds:.1f} s lost"
        return f"survived: {lost}; {self.by} noticed after {self.noticed:.2f} s."


def judge(
    scenario: Scenario,
    evidence: Evidence,
    undisturbed: Evidence,
    fresh: Callable[[Sequence[Interval]], Evidence],
) -> Judgement:
    """Return the judgement. fresh: makes a run without faults that skips these samples."""
    struck = [row["time"] for row in records(evidence.run)]
    since = evidence.signalled or min(struck, default=None)  # the first fault
    noticed = None
    if since is not None:  # seconds from it to the first line or event about it
        later = (line for line in evidence.lines() if line.time >= since)
        delays = (t.time - since for t in later if re.search(scenario.noticed, t.text))
        noticed = next(delays, None)
    wrong = [*_commands(scenario, evidence), *_strikes(scenario, evidence)]
    if not wrong:  # otherwise the rows would only repeat these problems
        wrong = list(_rows(scenario, evidence, undisturbed, fresh))
    if noticed is None and not wrong:
        wrong = ["no fault was noticed"]
    # Seconds from the fault to the last step, minus the same without faults.
    lost, step, times, usual = 0.0, scenario.first_step, evidence.step_times, undisturbed.step_times
    if since is not None and times and step in usual:
        lost = max(0.0, max(times.values()) - since - (max(usual.values()) - usual[step]))
    return Judgement(
        scenario.name,
        scenario.title,
        wrong,
        Status(evidence.run).lost().steps,
        lost,
        noticed,
        None if noticed is None else scenario.by,
        evidence.compute,
        evidence.seconds,
    )


def _commands(scenario: Scenario, evidence: Evidence) -> Iterator[str]:
    """Yield what is wrong with the ends of the commands and with their checkpoints."""
    for n, (command, code) in enumerate(zip(evidence.commands, scenario.codes, strict=False), 1):
        which = f"command {n}" if len(scenario.codes) > 1 else "the command"
        if command.code is None:
            yield f"{which} still ran after {command.seconds:.0f} s and was killed"
        elif command.code != code:
            yield f"{which} ended with code {command.code} instead of {code}"
        if code == USER:
            lines = [line.text for line in command.lines]
            if any("Traceback" in text for text in lines):
                yield f"{which} ended with a traceback instead of one sentence"
            if sum(text.startswith("forescale: ") for text in lines) != 1:
                yield f"{which} did not print exactly one error message"
        if command is not evidence.commands[-1] and command.torn:
            yield f"{which} left a damaged checkpoint ({command.torn[0]})"


def _strikes(scenario: Scenario, evidence: Evidence) -> Iterator[str]:
    """Yield faults that did not happen exactly once, and a missing signal."""
    struck = [row["fault"] for row in records(evidence.run)]
    for fault in scenario.strikes:
        if (times := struck.count(fault)) != 1:
            yield f"the fault {fault} happened {times} times"
    if scenario.signal_at is not None and evidence.signalled is None:
        yield "it ended before the signal was sent"


def _rows(
    scenario: Scenario,
    evidence: Evidence,
    undisturbed: Evidence,
    fresh: Callable[[Sequence[Interval]], Evidence],
) -> Iterator[str]:
    rows, right = evidence.rows, undisturbed.rows
    if scenario.rows == "rolled back":
        parents = [a.parent for a in evidence.run.attempts()]
        skipped = [p.skipped for p in parents if p][-1]
        if not skipped:
            yield "it skipped no samples"
            return
        right = fresh(skipped).rows
    if len(rows) != len(right):
        yield f"{len(rows)} steps count instead of {len(right)}"
        return
    if scenario.rows == "skipped":
        yield from _after_a_skip(scenario.first_step, rows, right)
    else:
        yield from _differences(rows, right, _ROW)


def _after_a_skip(step: int, rows: list[Row], right: list[Row]) -> Iterator[str]:
    """Yield differences beyond one dropped update: other data, or other rows before it."""
    yield from _differences(rows[: step - 1], right[: step - 1], _ROW)
    yield from _differences(rows, right, _DATA)
    yield from _differences(rows[step - 1 : step], right[step - 1 : step], ("loss",))
    for row in rows:
        if row["applied"] != (row["step"] != step):
            yield f"the update of step {row['step']} was {'not ' * row['applied']}dropped"
        if row["step"] != step and not math.isfinite(row["loss"] + row["grad_norm"]):
            yield f"step {row['step']} is not finite"


def _differences(rows: list[Row], right: list[Row], keys: Sequence[str]) -> Iterator[str]:
    """Yield the first difference between the rows, compared to the last digit."""
    for row, other in zip(rows, right, strict=True):
        for key in keys:
            if repr(row[key]) != repr(other[key]):
                yield f"{key} of step {other['step']} is {row[key]!r} instead of {other[key]!r}"
                return
