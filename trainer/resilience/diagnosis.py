"""Who is it that the others wait for? A pure function over beats; and the report of its answer.

    attempts/0003/hang.json         the verdict: the first that was published, the same for all
    attempts/0003/hang-HOST.txt     what a node's ranks did, with the Python stacks of those that
                                    answer

Invariant: a rank that waits for others is never blamed, nor one that may still be where it is.
"""

import json
import os
import sys
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType

from forescale.resilience.heartbeat import Seen

VERDICT = "hang.json"
# Places at which a rank may wait for others; in every other place it has its own work to do.
WAITS = frozenset({"backward", "norm", "update", "word"})


def waits_of(stage: int) -> frozenset[str]:
    """WAITS at a ZeRO stage: at stage 3 the forward gathers weights, layer by layer."""
    return WAITS | {"forward"} if stage == 3 else WAITS


@dataclass(frozen=True)
class Hang:
    """ranks, host, at, step: who is waited for, and where that rank is; sentence: all of it."""

    ranks: tuple[int, ...]
    host: str
    at: str
    step: int
    seconds: float
    sentence: str


def diagnose(seen: Sequence[Seen], world_size: int, waits: Collection[str] = WAITS) -> Hang | None:
    """Why the ranks stand still, or None while nobody does or whoever is waited for may yet be
    where it is.

    In this order: ranks that don't answer; ranks that never came; of the ranks at the lowest step
    those that have work of their own while others wait; those at the lowest step; and if nobody is
    behind, all (the collective itself hangs).
    """
    present = [s for s in seen if not s.beat.has_ended]
    stuck = [s for s in present if s.is_stuck]
    # A rank that waits for a silent one is stuck a moment before that one has been silent as long.
    silent = [s for s in present if s.is_silent or (stuck and s.silence > s.beat.quiet / 2)]
    if silent:
        return _hang(silent, present, waits, "has not answered for")
    if not stuck:
        return None
    missing = sorted(set(range(world_size)) - {s.beat.rank for s in seen})
    if missing and len(stuck) == len(seen) and all(s.beat.starting for s in stuck):
        return _never_came(missing, stuck)
    lowest = min(_step(s) for s in present)
    behind = [s for s in present if _step(s) == lowest]
    working = [s for s in behind if s.beat.at not in waits]
    guilty = [s for s in working or behind if s.is_stuck]
    return _hang(guilty, present, waits, "has been") if guilty else None


def _step(seen: Seen) -> int:
    """The step that a rank works for. Its data comes before the step begins."""
    return seen.beat.step + (seen.beat.at == "data")


def _hang(guilty: list[Seen], present: list[Seen], waits: Collection[str], how: str) -> Hang:
    silent = how == "has not answered for"
    first = max(guilty, key=lambda s: (s.silence if silent else s.beat.here, -s.beat.rank))
    beat, step = first.beat, _step(first)
    seconds = first.silence if silent else beat.here
    hosts = sorted({s.beat.host for s in guilty})
    who = _ranks([s.beat.rank for s in guilty])
    where = f"on host{'s' if len(hosts) > 1 else ''} {', '.join(hosts[:4])}"
    how = how if len(guilty) == 1 else how.replace("has", "have", 1)
    if silent:
        what = f"{how} {seconds:.0f} s; last seen in {beat.at} at step {step:,}"
    else:
        what = f"{how} in {beat.at} for {seconds:.0f} s at step {step:,}"
    blamed = {s.beat.rank for s in guilty}
    others = [s for s in present if s.beat.rank not in blamed]
    nobody = "nobody is behind: the collective itself hangs"
    if beat.at not in waits or silent:
        nobody = "nobody else is there to wait"
    return Hang(
        tuple(s.beat.rank for s in guilty),
        ", ".join(hosts),
        beat.at,
        step,
        round(seconds, 3),
        f"{who} {where} {what}; {_waiting(others, waits) or nobody}",
    )


def _waiting(others: Iterable[Seen], waits: Collection[str]) -> str:
    """Where the others are, those at one place together."""
    parts = []
    by_place = sorted(others, key=lambda s: (s.beat.at, s.beat.rank))
    for at, group in groupby(by_place, key=lambda s: s.beat.at):
        ranks = [s.beat.rank for s in group]
        verbs = ("waits", "wait") if at in waits else ("is", "are")
        parts.append(f"{_ranks(ranks)} {verbs[len(ranks) > 1]} in {at}")
    return ", ".join(parts)


def _never_came(missing: list[int], stuck: list[Seen]) -> Hang:
    seconds = min(s.beat.here for s in stuck)
    others = _ranks([s.beat.rank for s in stuck])
    verb = "waits" if len(stuck) == 1 else "wait"
    sentence = (
        f"{_ranks(missing)} never came; {others} {verb} since {seconds:.0f} s at {stuck[0].beat.at}"
    )
    return Hang(tuple(missing), "", "startup", 0, round(seconds, 3), sentence)


def _ranks(ranks: Sequence[int]) -> str:
    """rank 3; ranks 0 to 6 and 8."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    spoken = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a} to {b}" for a, b in runs]
    shown = spoken if len(spoken) <= 6 else [*spoken[:6], f"{len(spoken) - 6} more groups"]
    text = ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else shown[0]
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def publish(attempt: Path, hang: Hang) -> Hang:
    """Make it the attempt's verdict, or return the one that was published before."""
    path, temporary = attempt / VERDICT, attempt / f".{VERDICT}.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(hang), indent=1) + "\n")
    try:
        os.link(temporary, path)  # unlike a rename it never replaces
        temporary.unlink()
    except FileExistsError:
        temporary.unlink()
    except OSError:  # a file system without links
        os.replace(temporary, path)
    return verdict(attempt) or hang


def verdict(attempt: Path) -> Hang | None:
    """What an attempt hung in, where it did."""
    try:
        stored = json.loads((attempt / VERDICT).read_bytes())
        return Hang(**{**stored, "ranks": tuple(stored["ranks"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def python_stacks() -> str:
    """Where all threads of this process are, without the lines of the source, which may lie on a
    storage that hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines: list[str] = []
    for ident, top in sys._current_frames().items():
        lines.append(f"Thread {names.get(ident, ident)} (most recent call first):")
        frame: FrameType | None = top
        while frame is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
            frame = frame.f_back
        lines.append("")
    return "\n".join(lines)


def report(hang: Hang, seen: Iterable[Seen], stacks: dict[int, str]) -> str:
    """The whole report of a node as text; stacks: of its ranks that answered."""
    lines = [f"Hang: {hang.sentence}.", ""]
    for s in seen:
        b = s.beat
        state = "has ended" if b.has_ended else f"in {b.at}, for {b.here:.1f} s when it beat last"
        lines.append(
            f"rank {b.rank} (host {b.host}, process {b.pid}): step {b.step}, {state}, "
            f"heard {s.silence:.1f} s ago"
        )
    for s in seen:
        rank = s.beat.rank
        lines += ["", f"Python stacks of rank {rank}:"]
        lines.append(stacks.get(rank) or "  it doesn't answer: stopped, dead, or in the kernel")
    return "\n".join(lines) + "\n"
