"""On how many nodes the runs of a job can train: by their rules, and by their memory."""

from collections.abc import Sequence

from forescale.config.sizes import Sizes, in_words
from forescale.plan.plan import Plan
from forescale.slurm.config import SubmitJob


def job_of_plan(plan: Plan) -> SubmitJob:
    assert isinstance(plan.given, SubmitJob)
    return plan.given


def usable_nodes(plan: Plan) -> list[int]:
    """Return the numbers of nodes that a job can use, by its rules and its memory, the largest
    first."""
    return plan.fitting_sizes or [plan.nodes]


def nodes_of(plans: Sequence[Plan]) -> Sizes:
    """Return how many nodes a job asks for, without spare ones: those that each plan can use."""
    usable = [usable_nodes(plan) for plan in plans]
    return Sizes(max(sizes[-1] for sizes in usable), max(sizes[0] for sizes in usable))


def notes_on_sizes(plans: Sequence[Plan]) -> list[str]:
    """Return a sentence on the runs of a job that can't use all numbers of nodes which it may get,
    for each list of numbers that they can use."""
    runs: dict[tuple[int, ...], list[str]] = {}
    for plan in plans:
        runs.setdefault(tuple(usable_nodes(plan)), []).append(plan.given.run.name)
    nodes, notes = nodes_of(plans), list[str]()
    spares = f" and {n} to spare" if (n := job_of_plan(plans[0]).slurm.spares) else ""
    for sizes, names in runs.items():
        if excess := next((n for n in nodes if n not in sizes), 0):
            who = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            fit = next(n for n in sizes if n < excess)
            asks = f"{who} can use {in_words(sizes)} nodes, and SLURM is asked for {nodes}{spares}"
            notes.append(f"{asks}: of {excess} nodes a run uses {fit}, the rest stands idle.")
    return notes


def smallest(plan: Plan) -> Plan:
    """Return the plan on the fewest nodes that it can use: there a rank needs most memory, and a
    save takes longest."""
    return plan.sizes.get(usable_nodes(plan)[-1], plan)
