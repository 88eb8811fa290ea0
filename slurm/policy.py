"""How the ranks of a job ended, which nodes are to blame, and what to do with the job then.

    ranks end -> outcome, blamed nodes -> end the job, start again on the same nodes, with spare
                                          ones or on fewer, requeue, or give up

Invariant: everything counted over attempts (crashes, starts, blamed nodes) is read from the run's
files, so it survives any end of the batch script. A node is blamed only for an observation (a
process was killed there, a rank hung, a device failed), never for a Python error of a rank.
"""

import re
import signal
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from forescale.checkpoint.reader import Checkpoint
from forescale.ground.errors import CRASHED, DONE, GAVE_UP, INTERRUPTED, USER, UserError
from forescale.resilience import launcher, outcome
from forescale.resilience.outcome import LaunchRecord, launch_of
from forescale.run.directory import Run
from forescale.slurm.steps import Failure

JobAction = Literal["end", "restart", "requeue"]
# In the error of a rank: failures of a device, a link or a disk, not of a program.
_DEVICE = re.compile(f"{outcome.GPU}|Input/output error", re.IGNORECASE)
_TOO_OFTEN = 2  # failures of a node until it is excluded
_REFUSALS = 9  # of SLURM in a row, which take some 5 min
_PAUSE = 30.0  # seconds before the third start of a job without a new checkpoint, then doubled


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended. rank: that failed first; how: a sentence without a full stop; blamed:
    nodes that failed, with the reason; faulty: nodes that failed the preflight; refused: above 0 if
    SLURM started no task, so that no node and no rank is the cause; as how many refusals it counts.
    """

    code: int
    rank: int
    how: str
    blamed: dict[str, str] = field(default_factory=dict)
    faulty: dict[str, str] = field(default_factory=dict)
    refused: int = 0

    @property
    def needs_preflight(self) -> bool:
        """True if the nodes must be looked at before ranks start again: it is more than the error
        of a rank's program, or a kill of its process."""
        return bool(self.faulty or self.refused or (self.blamed and self.code != -signal.SIGKILL))


def outcome_of(
    attempt: Path,
    srun_code: int,
    failures: Sequence[Failure],
    stop_requested: bool,
    lost: str | None = None,
    refusal: str | None = None,
) -> AttemptOutcome:
    """Return how the attempt ended. failures: of srun, in order of time; lost: a node that SLURM
    lost later than those; refusal: why srun started no task.

    The failure that explains the others is the first UserError; else that of the first rank that
    was killed or wrote an error; ranks that only lost a peer or were stopped come last.
    """
    if not srun_code:
        return AttemptOutcome(DONE, 0, "done")
    tests: tuple[Callable[[Failure], bool], ...] = (
        lambda f: f.code == USER,
        lambda f: f.code < 0 or outcome.has_written_error(attempt, f.rank),
        lambda f: f.code != INTERRUPTED,
        lambda f: True,
    )
    first = next((f for test in tests for f in failures if test(f)), None)
    if first is None:
        how = f"srun ended with code {srun_code}, and no task did"
        if srun_code < 0:
            how = f"srun was killed by {signal.Signals(-srun_code).name}, and its ranks with it"
        if lost and not stop_requested:
            how = f"SLURM lost node {lost}"
            return AttemptOutcome(CRASHED, 0, how, {lost: how})
        if refusal and not stop_requested:
            return refused(refusal)
        return AttemptOutcome(INTERRUPTED if stop_requested else CRASHED, 0, how)
    code = INTERRUPTED if stop_requested and first.code != USER else first.code
    how, _ = outcome.describe_end(attempt, first.rank, code, first.how.startswith("Out Of Memory"))
    if code in (DONE, INTERRUPTED, USER):
        return AttemptOutcome(code, first.rank, how)
    at = f"{how} (on {first.host})" if first.host not in how else how
    blamed: dict[str, str] = {}
    if hung := outcome.hang_of(attempt):
        # If ranks of several nodes wait in a collective, none of them is known to be faulty.
        blamed = {hung[0].host: hung[0].sentence} if "," not in hung[0].host else {}
    elif (first.code < 0 and not first.how.startswith("Out Of Memory")) or _DEVICE.search(how):
        blamed = {first.host: how}
    return AttemptOutcome(CRASHED if code > 0 else code, first.rank, at, blamed)


def refused(refusal: str, count: int = 1) -> AttemptOutcome:
    """Return the end of an attempt that SLURM started no task of. refusal: what srun says; count:
    as how many refusals it counts."""
    how = f"SLURM refused to start it (srun: {refusal.rstrip('.')})"
    return AttemptOutcome(CRASHED, 0, how, refused=count)


@dataclass(frozen=True)
class Past:
    """The attempts of one submission, summed up. crashes: in a row, without a new checkpoint;
    blamed: the observed failures of each node; faulty: nodes that failed the preflight; idle:
    starts of the job in a row without a new checkpoint; refusals: how often SLURM has refused to
    start an attempt since the last one that it started; has_begun: True if it has started any."""

    crashes: int = 0
    blamed: dict[str, list[str]] = field(default_factory=dict)
    faulty: dict[str, str] = field(default_factory=dict)
    idle: int = 0
    refusals: int = 0
    has_begun: bool = False

    @property
    def excluded(self) -> dict[str, str]:
        """Nodes not to use again, with the reason."""
        often = {h: "; ".join(why) for h, why in self.blamed.items() if len(why) >= _TOO_OFTEN}
        return {**often, **self.faulty}


def past(run: Run, submission: str) -> Past:
    """Return the summary of a submission's attempts."""
    launches = [(a.number, launch_of(a.path)) for a in run.attempts()]
    of_submission = [
        (n, t) for n, t in launches if t.get("slurm", {}).get("submission") == submission
    ]
    saved = [number for step in run.checkpoint_steps() if (number := _author(run, step))]
    crashes = refusals = 0
    blamed: dict[str, list[str]] = {}
    faulty: dict[str, str] = {}
    for i, (number, launch) in enumerate(of_submission):
        after = of_submission[i + 1][0] if i + 1 < len(of_submission) else float("inf")
        if any(number <= author < after for author in saved):
            crashes = 0
        count = launch.get("refused", 0)
        refusals = refusals + count if count else 0
        # An attempt without a recorded end counts, because the job may crash its nodes; one that
        # got a stop signal, or never began because of faulty nodes or of SLURM, doesn't.
        if not (launch.get("stop_signal") or launch.get("faulty") or launch.get("refused")):
            code = launch.get("code")
            crashes += launcher.next_action(1 if code is None else code, 0) == "restart"
        for host, reason in launch.get("blamed", {}).items():
            blamed.setdefault(host, []).append(reason)
        faulty |= launch.get("faulty", {})
    has_begun = any(not launch.get("refused") for _, launch in of_submission)
    return Past(crashes, blamed, faulty, _idle(of_submission, saved), refusals, has_begun)


def _idle(launches: Sequence[tuple[int, LaunchRecord]], saved: Sequence[int]) -> int:
    """Return how many of the last starts of the job, in a row, brought no new checkpoint. launches:
    numbers and records of the submission's attempts; saved: numbers of attempts that wrote a
    checkpoint. A start that SLURM ended by itself (SIGTERM: a preemption, a requeue by hand)
    doesn't count, because that may happen often without any fault."""
    count, after = 0, float("inf")
    ended_by_slurm = {
        t.get("slurm", {}).get("restart"): t.get("stop_signal") == "SIGTERM" for _, t in launches
    }
    for restart, is_exempt in reversed(ended_by_slurm.items()):
        first = min(n for n, t in launches if t.get("slurm", {}).get("restart") == restart)
        if any(first <= author < after for author in saved):
            break
        count, after = count + (not is_exempt), first
    return count


def _author(run: Run, step: int) -> int | None:
    """Return the attempt that wrote a checkpoint; None if it can't be read."""
    try:
        return Checkpoint(run.checkpoint_path(step)).attempt
    except UserError:
        return None


@dataclass(frozen=True)
class JobDecision:
    """What to do, the exit code if the job ends, and the reason as text. exclude: nodes that a
    requeued job must not get; pause: seconds that it then waits at least."""

    action: JobAction
    code: int
    why: str
    exclude: tuple[str, ...] = ()
    pause: float = 0.0


def decide(
    code: int,
    past: Past,
    nodes: Sequence[str],
    *,
    is_stopped: bool,
    may_requeue: bool,
    state: str,
    others: Sequence[str] = (),
    down: Sequence[str] = (),
    sizes: Sequence[int] = (),
    enough: bool = True,
    most: int = 5,
) -> JobDecision:
    """Return what to do when ranks ended with `code`. Whether a crash is tried again follows the
    rule of the local launcher (`launcher.next_action`).

    past: including this end; nodes: of the attempt; others: more nodes of the job; state: SLURM's
    state of the job; down: nodes of the job that SLURM calls down; sizes: numbers of nodes that an
    attempt may have, the largest first; empty: as many as `nodes`; enough: whether enough nodes of
    the partition remain without the excluded ones; most: requeues in a row without a new checkpoint
    """
    if is_stopped and code != DONE:
        return JobDecision("end", INTERRUPTED, "stopped on request; submit it again to resume")
    if state != "RUNNING":
        # SLURM cancels or requeues it already; to requeue it now would undo a cancel.
        how = f"is ending this start of the job ({state.lower()})"
        why = f"SLURM {how}" if state else "SLURM has started the job again, or no longer knows it"
        return JobDecision("end", code, why)
    out = tuple(host for host in (*nodes, *others) if host in past.excluded)
    # Those of earlier nodes, too: SLURM keeps only the list that it got last.
    never = tuple(past.excluded) if out and enough else ()
    action = launcher.next_action(code, past.crashes)
    if code == INTERRUPTED:
        if may_requeue:
            return _requeue(code, past, "to resume", never, most)
        return JobDecision("end", code, "slurm.requeue=false; submit it again to resume")
    if action == "end":
        return JobDecision("end", code, "done" if code == DONE else "trying again would not help")
    if action == "give up":
        why = f"{past.crashes} crashes in a row without a new checkpoint"
        return JobDecision("end", GAVE_UP, f"gave up after {why}")
    left = [host for host in nodes if host in out or host in down]
    if not left and past.refusals:
        return _after_refusal(code, past, may_requeue, most)
    if not left:
        return JobDecision("restart", code, "starting again on the same nodes")
    well = sum(host not in out and host not in down for host in (*nodes, *others))
    if size := next((n for n in sizes or [len(nodes)] if n <= well), 0):
        spare = "a spare node in the place" if len(left) == 1 else "spare nodes in the places"
        if size < len(nodes):
            spare = f"{size} node{'s' * (size > 1)} instead"
        return JobDecision("restart", code, f"starting again with {spare} of {', '.join(left)}")
    down_alone = (f"{host} is down" for host in down if host not in out)
    named = ", ".join([*(f"{host} ({past.excluded[host]})" for host in out), *down_alone])
    if not may_requeue:
        why = f"it needs other nodes, but slurm.requeue=false: {named}"
        return JobDecision("end", code, why)
    if enough:
        return _requeue(code, past, f"to use other nodes: {named}", never, most)
    why = f"though too few nodes remain without those at fault: {named}"
    return _requeue(code, past, why, (), most)


def _after_refusal(code: int, past: Past, may_requeue: bool, most: int) -> JobDecision:
    """Return what to do when SLURM refused to start an attempt. For a while after its controller
    has come back it refuses what it has granted before; but it also refuses what the allocation
    lacks, for ever."""
    if past.refusals < _REFUSALS:
        return JobDecision("restart", code, "trying again: SLURM may be at fault for a while")
    if past.has_begun and may_requeue:
        return _requeue(code, past, "because SLURM refuses what it has granted before", (), most)
    todo = "correct the setting that srun names (slurm.srun, slurm.options, slurm.mem, CPUs, GPUs)"
    return JobDecision("end", USER, f"trying again has not helped; {todo}, and submit it again")


def chosen(
    current: Sequence[str],
    job: Sequence[str],
    out: Container[str],
    down: Container[str],
    sizes: Sequence[int],
) -> list[str]:
    """Return the nodes of the next attempt, in the order of the job's, as SLURM numbers ranks:
    as many of `sizes`, the largest first, as are well. current: nodes of the last attempt, which
    it keeps; out: nodes not to be used again; down: nodes that can't be used. Only where the others
    are too few for the smallest size it has these."""
    well = sum(host not in out and host not in down for host in job)
    size = next((n for n in sizes if n <= well), sizes[-1])
    best = sorted(job, key=lambda host: (host in down, host in out, host not in current))
    return [host for host in job if host in best[:size]]


@dataclass(frozen=True)
class Growth:
    """A restart on `nodes` nodes. gain: seconds that it saves; price: seconds that it takes."""

    nodes: int
    gain: float
    price: float


def growth(
    now: int, possible: int, step_seconds: Mapping[int, float], ahead: float, price: float
) -> Growth | None:
    """Return the growth that saves most time; None if none saves more than it costs. now: nodes of
    the attempt; possible: that it could have; step_seconds: seconds of a step by number of nodes;
    ahead: seconds that the attempt would train on, until the end of the run or the time limit,
    after which the job gets what is free anyway; price: seconds of a restart."""
    sizes = [n for n in step_seconds if now < n <= possible]
    best = min(sizes, key=lambda n: (step_seconds[n], n), default=now)
    gain = ahead * (1 - step_seconds[best] / step_seconds[now])
    return Growth(best, gain, price) if gain > price else None


def give_up(past: Past, most: int) -> JobDecision | None:
    """Return the end of a job whose starts bring nothing any more; None while they may."""
    if past.idle <= most:
        return None
    why = f"gave up after {past.idle} starts of the job in a row without a new checkpoint"
    if past.faulty:
        todo = f"repair or exclude the nodes at fault ({', '.join(past.faulty)})"
    else:
        todo = "see how the last attempts ended; if time ran out, set a longer slurm.time"
    return JobDecision("end", GAVE_UP, f"{why} (slurm.max_requeues={most}); {todo}")


def _requeue(code: int, past: Past, why: str, out: tuple[str, ...], most: int) -> JobDecision:
    """Return the decision to requeue, with a pause that grows while nothing is saved."""
    pause = _PAUSE * 2 ** (past.idle - 2) if past.idle > 1 else 0.0
    later = f", in {pause:.0f} s" if pause else ""
    return give_up(past, most) or JobDecision("requeue", code, f"requeued{later} {why}", out, pause)
