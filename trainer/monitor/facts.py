"""Runs as plain values, for programs: what `forescale status --json` prints.

Invariant: every run has every key that README.md beside this file names, None where it has no
value; seconds, bytes and fractions are not rounded. A key is never renamed, and its meaning stays.
"""

from typing import TYPE_CHECKING, Any

from forescale.ground.errors import UserError
from forescale.monitor.status import Status
from forescale.run.abilities import column_of

if TYPE_CHECKING:
    from forescale.slurm.queue import Job
    from forescale.slurm.queue_cache import EarlyEnd

KEYS = (
    "name", "path", "state", "error", "job", "attempt", "step", "total_steps", "tokens", "loss",
    "validation", "tokens_per_second", "seconds_per_step", "seconds_left", "mfu", "checkpoints",
    "seen", "last_event", "wall_seconds", "seconds", "rank_seconds", "sizes", "ettr", "failures",
    "lost_steps", "forecast",
)  # fmt: skip
_FORECAST = "step", "above", "loss", "low", "high", "level", "inside"
_VALIDATION = (
    "step", "tokens", "loss", "loss_stderr", "bits_per_byte", "rewards/accuracies", "windows",
)  # fmt: skip


def facts(
    status: Status, job: "Job | None" = None, end: "EarlyEnd | None" = None
) -> dict[str, Any]:
    """Return what is known of a run, by KEYS. job: its job in the queue; end: of its job, if no
    rank of it began. A run that can't be read has the state "unreadable". `error`: the reason of
    that, or why a run was halted or refused."""
    run, status.job_runs = status.run, job is not None and not job.is_waiting
    values: dict[str, Any] = {"name": run.name, "path": str(run.path)}
    try:
        values |= _facts(status, job)
        if end is not None and status.state != "complete":
            ended = {"id": end.submission.job, "state": end.state, "nodes": "", "exit": end.code}
            values |= {"state": "crashed", "job": ended}
    except UserError as e:
        values |= {"state": "unreadable", "error": str(e)}
    return {key: values.get(key) for key in KEYS}


def _facts(s: Status, job: "Job | None") -> dict[str, Any]:
    last, scored, goodput = s.last, s.validation, s.goodput
    checkpoints = [
        {
            "step": c.position.step,
            "tokens": c.position.tokens,
            "bytes": c.size,
            "attempt": c.attempt,
            "eligible": s.is_eligible(c),
            "pinned": s.is_pinned(c),
            "saved": c.path.stat().st_mtime,
        }
        for c in s.checkpoints
    ]
    if scored:  # with the abilities, if they are measured
        names = [*_VALIDATION, *filter(column_of, scored)]
        scored = {name: scored.get(name) for name in names}
    return {
        "state": s.state,
        "error": s.reason,
        "job": job and {"id": job.id, "state": job.state, "nodes": job.nodes, "exit": None},
        "attempt": s.attempts[-1].number if s.attempts else None,
        "step": s.step,
        "total_steps": s.job.total_steps,
        "tokens": s.tokens,
        "loss": last.get("loss"),
        "validation": scored,
        "tokens_per_second": s.tokens_per_second,
        "seconds_per_step": s.step_seconds,
        "seconds_left": s.seconds_left,
        "mfu": last.get("mfu"),
        "checkpoints": checkpoints,
        "seen": s.last_seen,
        "last_event": s.last_event,
        "wall_seconds": goodput.wall,
        "seconds": goodput.buckets,
        "rank_seconds": goodput.rank_seconds,
        "sizes": s.sizes(),
        "ettr": goodput.ettr if goodput.wall else None,
        "failures": goodput.failures,
        "lost_steps": s.lost().steps,
        "forecast": (anew := s.forecast_anew)
        and {
            **{name: anew[name] for name in _FORECAST},
            "left": (s.forecast_left or {}).get("since"),
        },
    }
