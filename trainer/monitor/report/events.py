"""The events of a run, each with its step and a sentence: starts, ends, rollbacks, faults.

Invariant: everything that the run recorded is an event here, except the ordinary: saving, deleting,
a good end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from forescale.ground.errors import DONE, INTERRUPTED, masked, shortened
from forescale.monitor.goodput import Launch
from forescale.monitor.status import Status
from forescale.run.directory import Attempt
from forescale.run.rows import Row, select

# The sort of an event, of LOOKS; an event that isn't named here is a note.
_SORTS = {
    "halt": "failure", "hang": "failure", "silent_corruption": "failure",
    "fault_injected": "failure", "update_dropped": "skipped", "member_quarantined": "skipped",
}  # fmt: skip
# Events that are told otherwise, or that every run has all the time.
_ELSEWHERE = {"checkpoint_saved", "checkpoint_deleted", "snapshot_saved"}
_ELSEWHERE |= {"exactness", "ended", "rollback", "forecast_anew", "text_written"}
_LONGEST = 200  # characters of one fact
_COMMON = ("kind", "attempt", "time", "step", "crc")  # of every row, beside its facts
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
    """One event. sort: of LOOKS; step: its place on a curve, None for none; time: seconds since the
    epoch, None if unknown."""

    sort: str
    text: str
    step: int | None
    time: float | None


def events_of(status: Status) -> list[Event]:
    """Return the events of a run, oldest first. Raises UserError for a damaged row."""
    launches = status.goodput.launches  # of a run that goes on, another may begin meanwhile
    rows = {a.number: status.rows_of_events(a) for launch in launches for a in launch.attempts}
    events: list[Event] = []
    for number, launch in enumerate(launches):
        for i, attempt in enumerate(launch.attempts):
            if i:
                events.append(_rollback(attempt, rows[launch.attempts[i - 1].number]))
            elif parent := attempt.parent:  # else it failed before it began to train
                if number:
                    text = f"attempt {attempt.number} resumed from step {parent.step:,}"
                    events.append(Event("restart", text, parent.step, launch.begun))
                elif parent.checkpoint is not None:
                    text = f"began with step {parent.step:,} of another run, "
                    text += masked(parent.checkpoint)
                    events.append(Event("note", text, parent.step, launch.begun))
            events += _recorded(rows[attempt.number], status, attempt)
        if end := _end(launch, status, rows[launch.attempts[-1].number]):
            events.append(end)
    return events


def _rollback(attempt: Attempt, before: list[Row]) -> Event:
    """Return the rollback that began an attempt. before: the events of the attempt before it."""
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
    """Return the end of a launch that is neither done nor alive. (Only our launcher records it.)"""
    is_last = launch is status.goodput.launches[-1]
    if launch.code == DONE or (is_last and status.state == "complete"):
        return None
    step = max([steps.last for steps in launch.steps[-1:]], default=None)
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
    """Yield the events that an attempt recorded itself."""
    for row in rows:
        kind = row.get("kind", "-")
        if kind in _ELSEWHERE or (kind == "hang" and attempt.number in status.hangs()):
            continue
        facts = []
        for name, x in row.items():
            if name not in _COMMON and x is not None:
                value = f"{x:.5g}" if isinstance(x, float) else shortened(masked(str(x)), _LONGEST)
                facts.append(f"{name.replace('_', ' ')} {value}")
        text = kind.replace("_", " ") + (f": {', '.join(facts)}" if facts else "")
        step = row.get("step")
        is_step = isinstance(step, int) and not isinstance(step, bool)
        yield Event(_SORTS.get(kind, "note"), text, step if is_step else None, row.get("time"))
