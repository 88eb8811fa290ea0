"""Whether a job that trains on fewer nodes than it may should requeue itself, to get nodes that are
free now.

Invariant: it only looks. A node counts as free if no job runs on it and SLURM would start this one
there at once: `sinfo` calls it idle, not planned, and `sbatch --test-only` agrees, which knows what
a site lets the job use, and what waits with a higher priority.
"""

import math
import os
import time
from collections.abc import Sequence
from itertools import pairwise

from forescale.config.train import TrainJob
from forescale.monitor.goodput import Launch
from forescale.monitor.status import Status
from forescale.resilience.outcome import launch_of
from forescale.resilience.phases import training_seconds
from forescale.run.directory import Run
from forescale.slurm import policy, queue
from forescale.slurm.submission import Submission

_FEWEST = 10  # steps that tell the speed of an attempt


def growth_of(
    run: Run, submission: Submission, job: TrainJob, id: str, nodes: int, held: Sequence[str]
) -> policy.Growth | None:
    """Return the growth of the newest attempt that is worth its time; None if there is none. id: of
    the job; nodes: of the attempt; held: those of the job that work. Raises UserError if SLURM
    doesn't answer."""
    status = Status(run)
    out = [*submission.settings.exclude, *policy.past(run, submission.name).excluded]
    # Below the largest size, an attempt uses the spare nodes of the job, too.
    room = max(nodes, sum(host not in out for host in held) - submission.settings.spares)
    possible = room + queue.num_idle(os.environ.get("SLURM_JOB_PARTITION", ""), out)
    launches = [x for x in status.goodput.launches if _submission_of(x) == submission.name]
    measured = {x.nodes: seconds for x in launches if (seconds := _step_seconds(x))}
    if possible <= nodes or not (launches and _step_seconds(launches[-1])):
        return None
    # Where no speed is planned, as on CPUs: by the micro-batches that a rank computes.
    each, planned = submission.settings.ranks_per_node, submission.facts.get("step_seconds", {})
    relative = {n: planned.get(str(n)) or job.accumulation(n * each) for n in submission.sizes}
    unit = measured[nodes] / relative[nodes]
    steps = {n: measured.get(n) or unit * value for n, value in relative.items()}
    end = queue.epoch(queue.show(id).get("EndTime", "")) or math.inf
    ahead = min(steps[nodes] * (job.total_steps - status.step), end - time.time())
    restarts = [x for pair in pairwise(launches) if (x := _restart_seconds(*pair))]
    price = restarts[-1] if restarts else submission.facts["restart"]
    while best := policy.growth(nodes, possible, steps, ahead, price):
        missing = best.nodes - room
        if missing <= 0 or queue.starts_now(submission.script, missing, out):
            return best
        possible = best.nodes - 1  # other idle nodes may lack what the job needs
    return None


def _submission_of(launch: Launch) -> str | None:
    return launch_of(launch.attempts[0].path).get("slurm", {}).get("submission")


def _step_seconds(launch: Launch) -> float | None:
    """Return the mean seconds of a step, without the first of each attempt, which may compile; None
    of too few."""
    count = sum(steps.count - 1 for steps in launch.steps)
    spent = (training_seconds(s.seconds) - training_seconds(s.first) for s in launch.steps)
    return sum(spent) / count if count >= _FEWEST else None


def _restart_seconds(before: Launch, launch: Launch) -> float | None:
    """Return the seconds that a requeue took, from the signal until the first step but without the
    time in the queue; None of another start of the ranks, and before the first step."""
    if launch.eligible is None or not launch.steps:
        return None
    saving = before.after.get("checkpoint", 0.0)
    starting = launch.head + launch.steps[0].first.get("startup", 0.0)
    return saving + launch.waited(before) - launch.queued(before) + starting
