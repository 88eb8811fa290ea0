"""What happened to a run, each with its step and in words: starts, ends, rollbacks, faults.

Invariant: everything that the run recorded is an event here, except what every run does all the
time: saving, deleting, ending well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from forescale.errors import DONE, INTERRUPTED, masked
from forescale.monitor.goodput import Launch
from forescale.monitor.status import Status
from forescale.run.directory import Attempt
from forescale.run.rows import Row, select

# What an event is drawn as; see LOOKS. An event that isn't named here is a note.
_SORTS = {
    "halt": "failure", "hang": "failure", "silent_corruption": "failure",
    "fault_injected": "failure", "update_dropped": "skipped", "member_quarantined": "skipped",
}  # fmt: skip
# Told otherwise, or what every run does all the time.
_ELSEWHERE = ("checkpoint_saved", "checkpoint_deleted", "exactness", "ended", "rollback")
_LONGEST = 200  # characters of one fact
_OWN = ("kind", "attempt", "time", "step", "crc")  # what a row says beside its facts
# The sorts, in the order of the key: a sign, a colour, and what it means.
LOOKS = {
    "rollback": ("↶", "#a0478a", "rolled back"),
    "failure": ("✕", "#b3261e", "failed"),
    "interrupted": ("‖", "#8a6d00", "interrupted"),
    "restart": ("▶", "#00805c", "resumed"),
    "skipped": ("◇", "#2a8fbd", "data or an update skipped"),
    "note": ("•", "#59636e", "noted"),
}


@dataclass(frozen=True)
class Event:
    """One event. sort: of LOOKS; step: where it belongs on a curve, None if nowhere; time: seconds
    since the epoch, None if unknown."""

    sort: str
    text: str
    step: int | None
    time: float | None


def events_of(status: Status) -> list[Event]:
    """Return the events of a run, oldest first. Raises UserError for a damaged row."""
    rows = {a.number: status.rows_of_events(a) for a in status.attempts}
    found: list[Event] = []
    for number, launch in enumerate(status.goodput.launches):
        for i, attempt in enumerate(launch.attempts):
            if i:
                found.append(_rollback(attempt, rows[launch.attempts[i - 1].number]))
            elif began := _beginning(attempt, launch, is_first=not number):
                found.append(began)
            found += _recorded(rows[attempt.number], status, attempt)
        if end := _end(launch, status, rows[launch.attempts[-1].number]):
            found.append(end)
    return found


def _beginning(attempt: Attempt, launch: Launch, is_first: bool) -> Event | None:
    parent = attempt.parent
    if parent is None:
        return None  # it failed before it began to train
    if is_first and parent.checkpoint is None:
        return None
    if is_first:
        text = f"began with step {parent.step:,} of another run, {masked(parent.checkpoint or '')}"
        return Event("note", text, parent.step, launch.begun)
    text = f"attempt {attempt.number} resumed from step {parent.step:,}"
    return Event("restart", text, parent.step, launch.begun)


def _rollback(attempt: Attempt, before: list[Row]) -> Event:
    """The rollback that began an attempt. before: the events of the attempt before it."""
    parent = attempt.parent
    rows = select(before, kind="rollback")
    if parent is None:
        return Event("rollback", "rolled back", None, None)
    text = f"rolled back from step {parent.rolled_back_from:,} to {parent.step:,}"
    if rows and rows[-1].get("reason"):
        text += f": {rows[-1]['reason']}"
    if parent.skipped:
        first, end = parent.skipped[-1]
        text += f"; samples {first:,} to {end - 1:,} are skipped for good"
    return Event("rollback", text, parent.rolled_back_from, rows[-1]["time"] if rows else None)


def _end(launch: Launch, status: Status, rows: list[Row]) -> Event | None:
    """How a launch ended, unless it was done or is alive. (Without a launcher of ours, no end is
    recorded.)"""
    is_last = launch is status.goodput.launches[-1]
    if launch.code == DONE or (is_last and status.state == "complete"):
        return None
    step = max([made.last for made in launch.made[-1:]], default=None)
    for row in select(rows, kind="ended"):
        step = row.get("step", step)
    number = launch.attempts[-1].number
    if launch.code == INTERRUPTED:
        how = "" if launch.how in ("", "interrupted") else f": {launch.how}"
        return Event("interrupted", f"attempt {number} was interrupted{how}", step, launch.ended)
    hang = status.hangs().get(number)
    how = hang.sentence if hang else launch.how or "its end was not recorded"
    return Event("failure", f"attempt {number} failed: {masked(how)}", step, launch.ended)


def _recorded(rows: list[Row], status: Status, attempt: Attempt) -> Iterator[Event]:
    """What an attempt recorded itself, in words."""
    for row in rows:
        kind = row["kind"]
        if kind in _ELSEWHERE or (kind == "hang" and attempt.number in status.hangs()):
            continue
        facts = {name: x for name, x in row.items() if name not in _OWN and x is not None}
        said = ", ".join(f"{name.replace('_', ' ')} {_short(x)}" for name, x in facts.items())
        text = kind.replace("_", " ") + (f": {said}" if said else "")
        step = row.get("step")
        is_step = isinstance(step, int) and not isinstance(step, bool)
        yield Event(_SORTS.get(kind, "note"), text, step if is_step else None, row.get("time"))


def _short(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else masked(str(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
