"""What becomes of a job when its ranks have ended: pure functions of what the attempts tell.

    ranks end -> code -> done, or: again on these nodes, back into the queue, give up

Invariant: everything that counts over the lives of a job (crashes, nodes to blame) is derived from
the run's attempts, so that it survives whatever ends the batch script.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from forescale.checkpoint.reader import Checkpoint
from forescale.errors import DONE, GAVE_UP, INTERRUPTED, UserError
from forescale.resilience import launcher
from forescale.resilience.outcome import launch_of
from forescale.run.directory import Run

Deed = Literal["end", "restart", "requeue"]
_TOO_OFTEN = 2  # faults of a node, until it is left out


@dataclass(frozen=True)
class Past:
    """Of one submission. crashes: in a row, without a new checkpoint; blamed: by node, what was
    seen of it; unfit: nodes that the preflight refused."""

    crashes: int = 0
    blamed: dict[str, list[str]] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)

    @property
    def excluded(self) -> dict[str, str]:
        """Nodes that are not to be used again, with the reason."""
        often = {h: "; ".join(why) for h, why in self.blamed.items() if len(why) >= _TOO_OFTEN}
        return {**often, **self.unfit}


def past(run: Run, submission: str) -> Past:
    """What the attempts of a submission have come to."""
    attempts = run.attempts()
    told = [(a.number, launch_of(a.path)) for a in attempts]
    lives = [(n, t) for n, t in told if t.get("slurm", {}).get("submission") == submission]
    saved = [number for step in run.checkpoint_steps() if (number := _author(run, step))]
    crashes = 0
    blamed: dict[str, list[str]] = {}
    unfit: dict[str, str] = {}
    for i, (number, life) in enumerate(lives):
        after = lives[i + 1][0] if i + 1 < len(lives) else float("inf")
        if any(number <= author < after for author in saved):
            crashes = 0
        crashes += is_crash(life)
        for host, reason in life.get("blamed", {}).items():
            blamed.setdefault(host, []).append(reason)
        unfit |= life.get("unfit", {})
    return Past(crashes, blamed, unfit)


def is_crash(life: dict[str, Any]) -> bool:
    """Whether an attempt ended in a way that may repeat. One that nobody saw end counts too: a job
    may be what kills its nodes. One that was asked to end doesn't, nor one that never
    began because of nodes that are left out from then on."""
    if life.get("asked") or life.get("unfit"):
        return False
    return launcher.after(life.get("code", 1), 0) == "restart"


def _author(run: Run, step: int) -> int | None:
    """The attempt that wrote a checkpoint; None for one that doesn't say."""
    try:
        return Checkpoint(run.checkpoint_path(step)).attempt
    except UserError:
        return None


@dataclass(frozen=True)
class Decision:
    """deed, the code that the job ends with, and why, for people to read."""

    deed: Deed
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
    ill: Sequence[str] = (),
) -> Decision:
    """What to do when ranks ended with `code`.

    past: with this end; nodes: of the job; state: SLURM's word for it; ill: nodes of the job that
    SLURM doesn't hold for usable. The same rule as the local launcher's (`launch.after`) says
    whether a crash is tried again.
    """
    if is_stopped and code != DONE:
        return Decision("end", INTERRUPTED, "stopped as asked; submit it again to go on")
    if state != "RUNNING":
        # It is being cancelled, or requeued by SLURM itself; to requeue it now would undo a cancel.
        return Decision("end", code, f"SLURM is ending the job ({state.lower() or 'unknown'})")
    out = tuple(host for host in nodes if host in past.excluded)
    deed = launcher.after(code, past.crashes)
    if code == INTERRUPTED:
        if may_requeue:
            return Decision("requeue", code, "goes on in the queue", out)
        return Decision("end", code, "slurm.requeue=false; submit it again to go on")
    if deed == "end":
        return Decision("end", code, "done" if code == DONE else "not to be mended by trying again")
    if deed == "give up":
        why = f"{past.crashes} crashes in a row without a new checkpoint"
        return Decision("end", GAVE_UP, f"gave up after {why}")
    if not out and not ill:
        return Decision("restart", code, "starts again on the same nodes")
    named = [f"{host} ({past.excluded[host]})" for host in out] + [f"{h} is down" for h in ill]
    if not may_requeue:
        return Decision("end", code, f"not without other nodes: {', '.join(named)}")
    return Decision("requeue", code, f"goes on on other nodes: {', '.join(named)}", out)
