"""The standby of a job with --no-kill, `python -P -m forescale.slurm.standby JOB RESTART ACTION`.

    SLURM takes the first node from the job -> the standby, on another node, requeues the job

Such a job is submitted with --no-kill: when one of its nodes goes down, SLURM takes this node from
the job, and the job goes on. If it is the first node, the batch script is gone with it, and SLURM
would leave the job without one until its time limit.

Invariant: it acts on the start of the job that began it alone, and only if the first node is lost.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from forescale.ground.errors import UserError
from forescale.slurm import queue

_EVERY = 20.0  # seconds; SLURM itself gives a node up only after minutes


def watch(job: str, restart: str, action: str, every: float = _EVERY) -> None:
    """Wait until the job has lost its first node, and requeue it; or cancel it, if `action` is
    "cancel". Return earlier if this start of the job is over."""
    while True:
        time.sleep(every)
        with suppress(UserError):  # the controller may be away for long
            facts = queue.show(job)
            if facts.get("Restarts") != restart:
                return
            first = facts["BatchHost"]
            if facts["JobState"] == "RUNNING" and first not in queue.hosts(facts["NodeList"]):
                print(f"The job has lost its first node, {first}: {action}.", flush=True)
                queue.cancel(job) if action == "cancel" else queue.requeue(job)


def main(arguments: Sequence[str]) -> None:
    job, restart, action = arguments
    watch(job, restart, action)


if __name__ == "__main__":
    main(sys.argv[1:])
