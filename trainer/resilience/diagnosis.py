"""Diagnosis of ranks from their heartbeats: which one hangs, which ones are slow, and the report.

    attempts/0003/hang.json         the diagnosis: the first that was published holds for all nodes
    attempts/0003/hang-HOST.txt     what a node's ranks did, with the Python stacks of those that
                                    answered

Invariant: a rank that waits for others is never blamed, nor one that is still within its time
limit. Slowness is compared only at places where all ranks do the same work, each alone: where they
wait for each other, the slow rank waits least.
"""

import json
import os
import sys
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import median_low
from types import FrameType

from forescale.config.sections.faults import ROUND
from forescale.ground.errors import UserError
from forescale.ground.storage import read_typed
from forescale.ground.typed import Count, Number
from forescale.resilience.heartbeat import Heartbeat, RankStatus

HANG = "hang.json"
# Places at which a rank may wait for others; at every other place it has work of its own.
# ("stream": for another stage of a pipeline).
WAITING_PLACES = frozenset({"backward", "norm", "update", "summary", "stream", *ROUND})
OWN_WORK = ("data", "forward")  # places where every rank does the same work, alone
_LEAST_STEPS = 10  # over which a pace is measured
_LEAST_SHARE = 0.05  # of a step's time: a smaller difference is noise


def waiting_places(
    stage: int, exchanges: bool = False, in_pipeline: bool = False
) -> frozenset[str]:
    """Return the places where ranks wait for each other at a ZeRO stage: at stage 3 also the
    forward, which gathers weights layer by layer, and so where ranks divide windows, matrices or
    experts (`exchanges`). In a pipeline gradients are reduced after all backward passes, which
    otherwise wait for none."""
    if stage == 3 or exchanges:
        return WAITING_PLACES | {"forward"}
    return WAITING_PLACES - {"backward"} if in_pipeline else WAITING_PLACES


@dataclass(frozen=True)
class Hang:
    """A diagnosed hang.

    ranks, host: the ranks that the others wait for, and their hosts. at, step: where the one that
    has been there longest is. seconds: how long. sentence: all of it, for people, with place, step
    and seconds of each rank that it names.
    """

    ranks: tuple[Count, ...]
    host: str
    at: str
    step: Count
    seconds: Number
    sentence: str


def diagnose(
    ranks: Sequence[RankStatus], world_size: int, waits: Collection[str] = WAITING_PLACES
) -> Hang | None:
    """Return who the ranks wait for, or None if no rank hangs or the ones waited for are still
    within their time limits.

    Blamed are, in this order: ranks that don't answer; ranks that never started; among the ranks at
    the lowest step those with work of their own while others wait; the ranks at the lowest step;
    and if no rank is behind, all (the collective itself hangs).
    """
    present = [s for s in ranks if not s.heartbeat.has_ended]
    stuck = [s for s in present if s.is_stuck]
    # A rank that waits for a silent one is stuck a moment before the other's silence is as long.
    silent = [s for s in present if s.is_silent or (stuck and s.silence > s.heartbeat.quiet / 2)]
    if silent:
        return _hang(silent, present, waits, silent=True)
    if not stuck:
        return None
    missing = sorted(set(range(world_size)) - {s.heartbeat.rank for s in ranks})
    if missing and len(stuck) == len(ranks) and all(s.heartbeat.starting for s in stuck):
        return _never_started(missing, stuck)
    lowest = min(_step(s) for s in present)
    behind = [s for s in present if _step(s) == lowest]
    working = [s for s in behind if s.heartbeat.at not in waits]
    blamed = [s for s in working or behind if s.is_stuck]
    return _hang(blamed, present, waits) if blamed else None


def _step(status: RankStatus) -> int:
    """Return the step that a rank works for. Its data is read before the step begins."""
    return status.heartbeat.step + (status.heartbeat.at == "data")


def _hang(
    blamed: list[RankStatus],
    present: list[RankStatus],
    waits: Collection[str],
    silent: bool = False,
) -> Hang:
    """Return what the blamed ranks do, and for how long; by place and step if these differ."""
    longest = {s.heartbeat.rank: s.silence if silent else s.heartbeat.here for s in blamed}
    first = max(blamed, key=lambda s: (longest[s.heartbeat.rank], -s.heartbeat.rank))
    at, step, seconds = first.heartbeat.at, _step(first), longest[first.heartbeat.rank]
    hosts = sorted({s.heartbeat.host for s in blamed})
    places: dict[tuple[int, str], list[int]] = {}
    for s in blamed:
        places.setdefault((_step(s), s.heartbeat.at), []).append(s.heartbeat.rank)
    each = ", ".join(
        f"{_format_ranks(ranks)} in {place} at step {number:,}"
        for (number, place), ranks in sorted(places.items())
    )
    span = _span([*longest.values()])
    if silent:
        last = f" in {at} at step {step:,}" if len(places) == 1 else f": {each}"
        blame = f"not answered for {span}; last seen{last}"
    elif len(places) == 1:
        blame = f"been in {at} for {span} at step {step:,}"
    else:
        blame = f"not moved for {span}: {each}"
    nobody = "no rank is behind: the collective itself hangs"
    if at not in waits or silent:
        nobody = "no other rank waits"
    others = _waiting((s.heartbeat for s in present if s.heartbeat.rank not in longest), waits)
    where = f"on host{'s' if len(hosts) > 1 else ''} {', '.join(hosts[:4])}"
    have = "has" if len(blamed) == 1 else "have"
    names = _format_ranks(list(longest)) + stages_text(s.heartbeat for s in blamed)
    sentence = f"{names} {where} {have} {blame}; {others or nobody}"
    return Hang(tuple(longest), ", ".join(hosts), at, step, round(seconds, 3), sentence)


def _span(seconds: Sequence[float]) -> str:
    """Return text such as "12 s" or "11 to 12 s"."""
    low, high = f"{min(seconds):.0f}", f"{max(seconds):.0f}"
    return f"{high} s" if low == high else f"{low} to {high} s"


def _waiting(others: Iterable[Heartbeat], waits: Collection[str]) -> str:
    """Describe where the other ranks are, grouped by place."""
    parts = []
    by_place = sorted(others, key=lambda b: (b.at, b.rank))
    for at, group in groupby(by_place, key=lambda b: b.at):
        ranks = [b.rank for b in group]
        verbs = ("waits", "wait") if at in waits else ("is", "are")
        parts.append(f"{_format_ranks(ranks)} {verbs[len(ranks) > 1]} in {at}")
    return ", ".join(parts)


def _never_started(missing: list[int], stuck: list[RankStatus]) -> Hang:
    here = [s.heartbeat.here for s in stuck]
    others = _format_ranks([s.heartbeat.rank for s in stuck])
    verb = "has" if len(stuck) == 1 else "have"
    places = " and ".join(sorted({s.heartbeat.at for s in stuck}))
    waited = f"{others} {verb} waited for {_span(here)} in {places}"
    sentence = f"{_format_ranks(missing)} never started; {waited}"
    return Hang(tuple(missing), "", "startup", 0, round(min(here), 3), sentence)


def _format_ranks(ranks: Sequence[int]) -> str:
    """Return text such as "rank 3" or "ranks 0 to 6 and 8"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a} to {b}" for a, b in runs]
    groups = texts if len(texts) <= 6 else [*texts[:6], f"{len(texts) - 6} more groups"]
    text = ", ".join(groups[:-1]) + " and " + groups[-1] if len(groups) > 1 else groups[0]
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def stages_text(heartbeats: Iterable[Heartbeat]) -> str:
    """Return text such as " (stage 1)" of ranks in a pipeline, else ""."""
    stages = sorted({b.stage for b in heartbeats if b.stage is not None})
    return f" (stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))})" if stages else ""


def publish_hang(attempt: Path, hang: Hang) -> Hang:
    """Write hang.json unless it exists, and return the diagnosis that it holds."""
    path, temporary = attempt / HANG, attempt / f".{HANG}.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(hang), indent=1) + "\n")
    try:
        os.link(temporary, path)  # unlike a rename it never replaces
        temporary.unlink()
    except FileExistsError:
        temporary.unlink()
    except OSError:  # a file system without links
        os.replace(temporary, path)
    return read_hang(attempt) or hang


def read_hang(attempt: Path) -> Hang | None:
    """Return the hang in which an attempt ended, or None."""
    try:
        return read_typed(Hang, attempt / HANG)
    except UserError:
        return None


def python_stacks() -> str:
    """Return the stacks of all threads of this process, without source lines: those may lie on a
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


def hang_report(hang: Hang, ranks: Sequence[RankStatus], stacks: dict[int, str]) -> str:
    """Return a node's report as text. stacks: by rank, of those that answered."""
    lines = [f"Hang: {hang.sentence}.", ""]
    for s in ranks:
        b = s.heartbeat
        state = f"in {b.at}, for {b.here:.1f} s at its last heartbeat"
        lines.append(
            f"rank {b.rank}{stages_text([b])} (host {b.host}, process {b.pid}): step {_step(s)}, "
            f"{'has ended' if b.has_ended else state}, {s.silence:.1f} s ago"
        )
    for s in ranks:
        rank = s.heartbeat.rank
        lines += ["", f"Python stacks of rank {rank}:"]
        lines.append(stacks.get(rank) or "  no answer: it is stopped, dead, or inside the kernel")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Straggler:
    """A slow rank. seconds, median: time per step at the place, of this rank and of all. stage: its
    stages_text."""

    rank: int
    host: str
    at: str
    seconds: float
    median: float
    steps: int
    stage: str = ""

    @property
    def sentence(self) -> str:
        """The finding for people, without a full stop."""
        times = f" ({self.seconds / self.median:.1f} times)" if self.median else ""
        return (
            f"rank {self.rank}{self.stage} on host {self.host} is slow: {self.seconds * 1e3:.1f} "
            f"ms per step in {self.at}, where the median of all ranks is "
            f"{self.median * 1e3:.1f} ms{times}, over {self.steps} steps"
        )


def stragglers(
    heartbeats: Sequence[Heartbeat], factor: float, waits: Collection[str] = ()
) -> list[Straggler]:
    """Return the ranks that take more than `factor` times the median at some place and lose at
    least a twentieth of a step there; the slowest first.

    Of two ranks the faster one is the median: with their mean the slower would never be found.
    """
    running = [b for b in heartbeats if b.steps >= _LEAST_STEPS and not b.has_ended]
    if len(running) < 2:
        return []
    step = median_low([sum(b.pace.values()) for b in running])
    slow = []
    for at in OWN_WORK:
        if at in waits:
            continue
        for b in running:  # stages of a pipeline have different work
            same = [o for o in running if at == "data" or o.stage == b.stage]
            median = median_low([o.pace.get(at, 0.0) for o in same])
            seconds = b.pace.get(at, 0.0)
            if seconds > factor * median and seconds - median > _LEAST_SHARE * step:
                stage = stages_text([b])
                slow.append(Straggler(b.rank, b.host, at, seconds, median, b.steps, stage))
    return sorted(slow, key=lambda s: s.median - s.seconds)
