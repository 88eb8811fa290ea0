"""The rounds of a run on several clusters: their bytes, their time, and whether they pay.

Invariant: training stands still during a round, but for the steps of outer.overlap; these seconds
are added to those of the steps. Steps that exchanged gradients over the same link would send and
receive as many bytes each.
"""

import math
from typing import TYPE_CHECKING

from forescale.config.train import TrainJob
from forescale.ground.console import span
from forescale.plan.blocks import Row, bytes_text
from forescale.plan.bytes.parameters import Inventory

if TYPE_CHECKING:
    from forescale.plan.plan import Plan

_WEIGHT = 4  # bytes that a member sends of a parameter
_MUCH = 0.05  # of the time: beyond it a faster link or fewer rounds are worth while


def sent_bytes(trained: Inventory) -> int:
    """Return the bytes that a member sends in a round, and receives from each other one."""
    return _WEIGHT * sum(p.numel for g in trained.groups for p in g.params)


def exchange_seconds(job: TrainJob, trained: Inventory) -> float:
    """Return the seconds that an exchange of all fragments takes; 0.0 on one cluster."""
    return sent_bytes(trained) * job.outer.count / job.outer.link if job.outer.every else 0.0


def standing_seconds(job: TrainJob, trained: Inventory, step: float) -> float:
    """Return for how many seconds of `outer.every` training stands still. step: seconds of one."""
    return max(0.0, exchange_seconds(job, trained) - seconds_beside(job, step))


def seconds_beside(job: TrainJob, step: float) -> float:
    """Return for how many seconds of `outer.every` training goes on beside exchanges."""
    return job.outer.fragments * job.outer.delay * step


def outer_rows(plan: "Plan") -> list[Row]:
    """Return the row of the rounds, and a sentence of when they pay; none on one cluster."""
    config = plan.job.outer
    if (steps := config.steps) is None:
        return []
    sent = sent_bytes(plan.trained)
    received = sent * (config.count - 1)
    seconds, step = exchange_seconds(plan.job, plan.trained), plan.chosen.step.seconds
    training = step and step * steps
    facts = {"sent_bytes": sent, "received_bytes": received, "seconds": seconds,
             "training_seconds": training, "steps": steps}  # fmt: skip
    parts = f" in {config.fragments} fragments" if config.fragments > 1 else ""
    text = (
        f"every {steps:,} steps{parts} a member sends {bytes_text(sent)} and receives "
        f"{bytes_text(received)}: {span(seconds)} at {bytes_text(config.link)}/s (outer.link)"
    )
    if not training or not step:
        return [Row("outer", "rounds", facts, "", f"{text}; the time of a step is not known")]
    standing = standing_seconds(plan.job, plan.trained, step)
    share = standing / (standing + training)
    text += f" after {span(training)} of steps"
    text += f", beside {config.overlap} of each fragment" if config.delay else ""
    text += f"; training stands still for {share:.1%} of the time"
    allowed = _MUCH / (1 - _MUCH)  # seconds that it stands still for each second of training
    needed = (sent + received) / (allowed * training + seconds_beside(plan.job, step))
    factor = (seconds + step) * steps / (standing + training)
    others = [f"with outer.every='{math.ceil(standing / (allowed * step))} steps'"]
    if (hiding := math.ceil(seconds / (config.fragments * step))) < steps // config.fragments:
        others.append(f"for none of it with outer.overlap='{hiding} steps'")
    pays = (
        f"for less than {_MUCH:.0%} from {bytes_text(needed)}/s on"
        f"{''.join(f', or {other}' for other in others if share > _MUCH)}; with gradients over "
        f"this link in each step the run would take {factor:,.1f} times as long"
    )
    facts |= {"standing_seconds": standing, "share": share, "needed_link": needed}
    return [Row("outer", "rounds", facts, "", text), Row("", "they pay", text=pays)]
