"""What launching the cells of a study has in common, on this machine and in SLURM's queue.

Invariant: a cell starts only if its cost is still within the cap.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

from forescale.config.compose import compose
from forescale.config.target import targets
from forescale.config.train import TrainJob
from forescale.ground.errors import PREFIX, UserError
from forescale.scaling.config import LaunchKeys
from forescale.scaling.design.cells import Cell
from forescale.scaling.study.decisions import advance
from forescale.scaling.study.directory import Study
from forescale.scaling.study.law_decisions import add_target
from forescale.scaling.study.states import CellState


class Launcher(ABC):
    """Runs one study. keys: how; log: gets a line when a cell ends and at each decision."""

    def __init__(self, study: Study, keys: LaunchKeys, log: Callable[[str], None]):
        self.study, self.keys, self.log = study, keys, log
        self.stop_signal: int | None = None

    @abstractmethod
    def go(self) -> int:
        """Run until nothing is left and return the exit code."""

    @abstractmethod
    def running(self) -> Collection[str]:
        """Return the names of the cells that run or are in the queue."""

    @abstractmethod
    def start_ready(self) -> None:
        """Start the cells that can start now, as many as may run at once."""

    def advance(self) -> None:
        """Decide and start cells; once nothing is left, predict and start the target too."""
        advance(self.study, self.log)
        self.start_ready()
        has_target = any(c.role == "target" for c in self.study.plan.cells)
        if self.keys.target and not self.running() and not has_target:
            add_target(self.study, self.log)
            self.start_ready()


def expect_within_cap(study: Study, cell: Cell, under_way: Collection[str]) -> None:
    """Raise UserError if this cell would exceed the cap. Cells under way count with their whole
    cost. The target is exempt."""
    if cell.role == "target":
        return
    states = {s.cell.name: s for s in study.states()}
    spent = sum(
        max(s.spent, s.cell.cost) if name in under_way else s.spent
        for name, s in states.items()
        if s.cell.role != "target"
    )
    left = cell.cost * (1 - states[cell.name].done)
    if spent + left > study.plan.cap:
        problem = f"{spent:.4g} of {study.plan.cap:.4g} FLOPs are spent or under way"
        problem = f"{problem}, and {cell.name} needs {left:.3g} more"
        todo = "end the study here, or plan a new one with a larger cap"
        raise UserError("plan.cap", problem, todo)


def summary(study: Study, s: CellState) -> str:
    """Return a line about a cell that ended."""
    c, ended = s.cell, [x.has_ended for x in study.states()]
    result = f"{s.status} ({s.why})" if s.why else s.status
    if s.status == "complete":
        result = f"loss {s.loss:.4f}"
    return (
        f"{c.name}: N={c.shape.parameters:,} D={c.tokens:,} rate {c.learning_rate:.2g}: "
        f"{result} in {s.seconds:.0f} s | {sum(ended)}/{len(ended)} cells, "
        f"{study.spent / study.plan.cap:.1%} of the cap"
    )


def expect_no_code(study: Study) -> None:
    """Raise UserError if the study's files name classes of the user's own, or read the environment
    by a resolver such as ${oc.env:NAME}, or a secret by its name: launching would do what a file
    says, and not the command. The job of each cell is judged again where it is composed."""
    todo = "give launch.trust=true if you trust the study"
    for cell in study.plan.cells:
        for text in study.arguments(cell):
            if re.search(r"\$\{.*:", text) or f"${PREFIX}" in text:
                problem = f"the stored argument {text} reads more than the study's own files"
                raise UserError(str(study.folder), problem, todo)
    for recipe in [r.arguments for r in study.plan.recipes] or [()]:
        job = compose(TrainJob, [*study.job.plan.shared, *recipe])
        for key, target in targets(job).items():
            problem = f"plan.arguments names code to run, {key}={target}"
            raise UserError(str(study.folder / "study.yaml"), problem, todo)
