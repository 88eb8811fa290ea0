"""What became of a run that faults struck: survived or not, what it cost, who noticed, how fast.

Invariant: judged from what the run left on disk and from what its commands printed, by comparison
with a run that nobody disturbed; no fault is waved through for want of evidence.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from forescale.drill.scenarios import Scenario
from forescale.errors import USER
from forescale.monitor.status import Status
from forescale.resilience.injector import records
from forescale.run.directory import Run, read_rows

_DATA = ("step", "g0", "g1", "tokens", "tokens_hash")
_ROW = (*_DATA, "loss", "grad_norm")
_STEP_LINE = re.compile(r"step +(\d+)/")  # of the progress
Row = dict[str, Any]
Interval = tuple[int, int]


@dataclass(frozen=True)
class Told:
    """A line of output or an event, and when it came (seconds since the epoch)."""

    time: float
    text: str


@dataclass(frozen=True)
class Command:
    """One `forescale train`, from its start to its end. code: None where it went on for longer than
    it was given; torn: checkpoints that weren't whole when it had ended, a sentence each."""

    code: int | None
    began: float
    ended: float
    said: Sequence[Told]
    torn: Sequence[str] = ()

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class Evidence:
    """A run and the commands that it took; signalled: when it got SIGTERM."""

    run: Run
    commands: Sequence[Command]
    signalled: float | None = None

    @property
    def seconds(self) -> float:
        return sum(c.seconds for c in self.commands)

    @property
    def rows(self) -> list[Row]:
        """The steps that count."""
        return Status(self.run).train

    @property
    def compute(self) -> float:
        """Seconds of computing that count."""
        return sum(row["seconds"].get("compute", 0.0) for row in self.rows)

    @property
    def step_times(self) -> dict[int, float]:
        """When each step was told of, the last time that it was made."""
        said = [told for c in self.commands for told in c.said]
        found = ((_STEP_LINE.match(told.text), told.time) for told in said)
        return {int(match[1]): time for match, time in found if match}

    def told(self) -> list[Told]:
        """Lines and events in the order of time; an event as its kind and its JSON."""
        events = (row for a in self.run.attempts() for row in read_rows(a.events.path))
        found = [Told(row["time"], f"{row['kind']} {json.dumps(row)}") for row in events]
        return sorted([*found, *(t for c in self.commands for t in c.said)], key=lambda t: t.time)


@dataclass(frozen=True)
class Verdict:
    """wrong: why it was not survived, a sentence each; steps: made and not kept, by the rows;
    seconds: from the first fault to the last step, beyond what an undisturbed run needs from there;
    noticed: seconds after the first fault."""

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
        """A plain sentence."""
        if self.wrong:
            return f"NOT survived: {'; '.join(self.wrong)}."
        lost = f"{self.steps} step{'s' * (self.steps != 1)} and {self.seconds:.1f} s lost"
        return f"survived: {lost}; {self.by} noticed after {self.noticed:.2f} s."


def judge(
    scenario: Scenario,
    evidence: Evidence,
    undisturbed: Evidence,
    fresh: Callable[[Sequence[Interval]], Evidence],
) -> Verdict:
    """fresh: an undisturbed run that passes over these intervals of samples."""
    since = _struck(evidence)
    noticed = _noticed(scenario, since, evidence)
    wrong = [*_commands(scenario, evidence), *_strikes(scenario, evidence)]
    if not wrong:  # else the rows can't be right, and would only echo it
        wrong = list(_rows(scenario, evidence, undisturbed, fresh))
    if noticed is None and not wrong:
        wrong = ["nobody noticed"]
    return Verdict(
        scenario.name,
        scenario.title,
        wrong,
        Status(evidence.run).lost().steps,
        _lost(scenario.first_step, since, evidence, undisturbed),
        noticed,
        None if noticed is None else scenario.by,
        evidence.compute,
        evidence.seconds,
    )


def _commands(scenario: Scenario, evidence: Evidence) -> Iterator[str]:
    """Whether they ended as they should, and left whole checkpoints and a sentence behind."""
    for n, (command, code) in enumerate(zip(evidence.commands, scenario.codes, strict=False), 1):
        which = f"command {n}" if len(scenario.codes) > 1 else "the command"
        if command.code is None:
            yield f"{which} still ran after {command.seconds:.0f} s, and was ended"
        elif command.code != code:
            yield f"{which} ended with code {command.code} where {code} is right"
        if code == USER:
            said = [told.text for told in command.said]
            if any("Traceback" in text for text in said):
                yield f"{which} ended with a traceback where a sentence is right"
            if sum(text.startswith("forescale: ") for text in said) != 1:
                yield f"{which} didn't say in one sentence what is wrong"
        if command is not evidence.commands[-1] and command.torn:
            yield f"{which} left a damaged checkpoint ({command.torn[0]})"


def _strikes(scenario: Scenario, evidence: Evidence) -> Iterator[str]:
    """Faults that never happened prove nothing."""
    struck = [row["fault"] for row in records(evidence.run)]
    for fault in scenario.strikes:
        if (times := struck.count(fault)) != 1:
            yield f"the fault {fault} happened {times} times"
    if scenario.signal_at is not None and evidence.signalled is None:
        yield "it ended before the signal was sent"


def _struck(evidence: Evidence) -> float | None:
    """When the first fault struck."""
    times = [row["time"] for row in records(evidence.run)]
    return evidence.signalled or min(times, default=None)


def _noticed(scenario: Scenario, since: float | None, evidence: Evidence) -> float | None:
    """Seconds from the fault to the first line or event that tells of it."""
    if since is None:
        return None
    later = (told for told in evidence.told() if told.time >= since)
    return next((t.time - since for t in later if re.search(scenario.noticed, t.text)), None)


def _lost(step: int, since: float | None, evidence: Evidence, undisturbed: Evidence) -> float:
    """Seconds from the fault to the last step, less those from `step` to the last undisturbed."""
    times, usual = evidence.step_times, undisturbed.step_times
    if since is None or not times or step not in usual:
        return 0.0
    needed = max(usual.values()) - usual[step]
    return max(0.0, max(times.values()) - since - needed)


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
            yield "it passed over no samples"
            return
        right = fresh(skipped).rows
    if len(rows) != len(right):
        yield f"{len(rows)} steps count where {len(right)} are right"
        return
    if scenario.rows == "skipped":
        yield from _after_a_skip(scenario.first_step, rows, right)
    else:
        yield from _differences(rows, right, _ROW)


def _after_a_skip(step: int, rows: list[Row], right: list[Row]) -> Iterator[str]:
    """Up to the skipped update all is as it was; from there on the same data is read."""
    yield from _differences(rows[: step - 1], right[: step - 1], _ROW)
    yield from _differences(rows, right, _DATA)
    yield from _differences(rows[step - 1 : step], right[step - 1 : step], ("loss",))
    for row in rows:
        if row["applied"] != (row["step"] != step):
            yield f"the update of step {row['step']} was {'not ' * row['applied']}dropped"
        if row["step"] != step and not math.isfinite(row["loss"] + row["grad_norm"]):
            yield f"step {row['step']} is not finite"


def _differences(rows: list[Row], right: list[Row], keys: Sequence[str]) -> Iterator[str]:
    """The first row that isn't right, to the last digit."""
    for row, other in zip(rows, right, strict=True):
        for key in keys:
            if repr(row[key]) != repr(other[key]):
                yield f"{key} of step {other['step']} is {row[key]!r} where {other[key]!r} is right"
                return
