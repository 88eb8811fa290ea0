"""What to do with a job when its ranks have ended: pure functions of the run's attempts.

    ranks end -> code -> end the job, start again on the same nodes, requeue, or give up

Invariant: everything counted over attempts (crashes, blamed nodes) is read from the run's files, so
it survives any end of the batch script.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from forescale.checkpoint.reader import Checkpoint
from forescale.errors import DONE, GAVE_UP, INTERRUPTED, UserError
from forescale.resilience import launcher
from forescale.resilience.outcome import launch_of
from forescale.run.directory import Run

JobAction = Literal["end", "restart", "requeue"]
_TOO_OFTEN = 2  # failures of a node until it is excluded


@dataclass(frozen=True)
class Past:
    """The attempts of one submission, summed up.

    crashes: in a row, without a new checkpoint; blamed: the observed failures of each node; faulty:
    nodes that failed the preflight.
    """

    crashes: int = 0
    blamed: dict[str, list[str]] = field(default_factory=dict)
    faulty: dict[str, str] = field(default_factory=dict)

    @property
    def excluded(self) -> dict[str, str]:
        """Nodes not to use again, with the reason."""
        often = {h: "; ".join(why) for h, why in self.blamed.items() if len(why) >= _TOO_OFTEN}
        return {**often, **self.faulty}


def past(run: Run, submission: str) -> Past:
    """Return the summary of a submission's attempts."""
    launches = [(a.number, launch_of(a.path)) for a in run.attempts()]
    own = [(n, t) for n, t in launches if t.get("slurm", {}).get("submission") == submission]
    saved = [number for step in run.checkpoint_steps() if (number := _author(run, step))]
    crashes = 0
    blamed: dict[str, list[str]] = {}
    faulty: dict[str, str] = {}
    for i, (number, launch) in enumerate(own):
        after = own[i + 1][0] if i + 1 < len(own) else float("inf")
        if any(number <= author < after for author in saved):
            crashes = 0
        crashes += is_crash(launch)
        for host, reason in launch.get("blamed", {}).items():
            blamed.setdefault(host, []).append(reason)
        faulty |= launch.get("faulty", {})
    return Past(crashes, blamed, faulty)


def is_crash(launch: dict[str, Any]) -> bool:
    """True if an attempt ended in a way that may repeat.

    An attempt without a recorded end counts, because the job may crash its nodes. Attempts that got
    a stop signal, or never began because of faulty nodes, don't count.
    """
    if launch.get("stop_signal") or launch.get("faulty"):
        return False
    return launcher.next_action(launch.get("code", 1), 0) == "restart"


def _author(run: Run, step: int) -> int | None:
    """Return the attempt that wrote a checkpoint; None if it can't be read."""
    try:
        return Checkpoint(run.checkpoint_path(step)).attempt
    except UserError:
        return None


@dataclass(frozen=True)
class JobDecision:
    """What to do, the exit code if the job ends, and the reason as text."""

    action: JobAction
    code: int
    why: str
    exclude: tuple[str, ...] = ()


def decide(
    code: int,
    past: Past,
    nodes: Sequence[str],
    *,
    is_stopped: bool,
    may_requeue: bool,
    state: str,
    down: Sequence[str] = (),
) -> JobDecision:
    """What to do when ranks ended with `code`.

    past: including this end; nodes: of the job; state: SLURM's state of the job; down: nodes of the
    job that SLURM calls down. Whether a crash is tried again follows the rule of the local launcher
    (`launcher.next_action`).
    """
    if is_stopped and code != DONE:
        return JobDecision("end", INTERRUPTED, "stopped on request; submit it again to resume")
    if state != "RUNNING":
        # SLURM cancels or requeues it already; to requeue it now would undo a cancel.
        return JobDecision("end", code, f"SLURM is ending the job ({state.lower() or 'unknown'})")
    out = tuple(host for host in nodes if host in past.excluded)
    action = launcher.next_action(code, past.crashes)
    if code == INTERRUPTED:
        if may_requeue:
            return JobDecision("requeue", code, "requeued to resume", out)
        return JobDecision("end", code, "slurm.requeue=false; submit it again to resume")
    if action == "end":
        return JobDecision("end", code, "done" if code == DONE else "trying again would not help")
    if action == "give up":
        why = f"{past.crashes} crashes in a row without a new checkpoint"
        return JobDecision("end", GAVE_UP, f"gave up after {why}")
    if not out and not down:
        return JobDecision("restart", code, "starting again on the same nodes")
    named = [f"{host} ({past.excluded[host]})" for host in out] + [f"{h} is down" for h in down]
    if not may_requeue:
        return JobDecision(
            "end", code, f"it needs other nodes, but slurm.requeue=false: {', '.join(named)}"
        )
    return JobDecision("requeue", code, f"requeued to use other nodes: {', '.join(named)}", out)
