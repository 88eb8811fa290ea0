"""Whether the runs of a stage contradict the forecasts that were written before them.

    contradicted   two or more runs outside their interval, or all of them so far off together that
                   their mean error is wider than their mean interval
    asked once     until somebody goes on, each launch asks again; once a later stage is decided,
                   it is too late to ask

Invariant: of a size that was trained at several learning rates the best run counts, as in the fit.
Errors of one stage are alike, so that about one stage in ten contradicts right forecasts of 90 %.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from forescale.ground.errors import UserError
from forescale.scaling.analysis.forecast import read_forecasts
from forescale.scaling.design.plan import StudyStage
from forescale.scaling.study.directory import Study

ACCEPTED = "contradiction_accepted"  # the event of going on
GO_ON = "launch.contradiction=continue"


@dataclass(frozen=True)
class Judgement:
    """The forecasts of a stage against its runs. errors: log of observed over predicted loss;
    halves: half of the interval of log loss, (n,) each; level: of the intervals."""

    errors: tuple[float, ...]
    halves: tuple[float, ...]
    level: float

    @property
    def outside(self) -> int:
        """Number of runs outside their interval."""
        return int((np.abs(self.errors) > self.halves).sum())

    @property
    def is_contradicted(self) -> bool:
        """True if the errors are too many or too large for chance."""
        return self.outside > 1 or abs(np.mean(self.errors)) > np.mean(self.halves)

    def __str__(self) -> str:
        off = math.expm1(np.mean(self.errors))
        count = f"{self.outside} of {len(self.errors)} runs"
        return (
            f"{count} are outside their {self.level:.0%} interval, and losses are {abs(off):.1%} "
            f"{'higher' if off > 0 else 'lower'} than predicted on average"
        )


def judgement(study: Study, stage: StudyStage) -> Judgement | None:
    """Return the judgement of a stage that has ended; None if it runs or has no forecasts."""
    states = [s for s in study.states() if s.cell.stage == stage.number]
    if not all(s.has_ended for s in states):
        return None
    facts = {f.facts["target"]["run"]: f.facts for f in read_forecasts(study.forecasts)}
    errors, halves, level = list[float](), list[float](), 0.0
    for name in (c.name for c in stage.cells if c.name in facts):
        losses = [s.loss for s in states if s.status == "complete" and s.cell.cell_of == name
                  and s.cell.role in ("grid", "rate") and s.loss is not None]  # fmt: skip
        if losses:
            low, high = facts[name]["interval"]
            errors.append(math.log(min(losses) / facts[name]["loss"]))
            halves.append(math.log(high / low) / 2)
            level = facts[name]["level"]
    return Judgement(tuple(errors), tuple(halves), level) if errors else None


def ask_if_contradicted(
    study: Study, stage: StudyStage, goes_on: Callable[[str], bool], log: Callable[[str], None]
) -> None:
    """Say so if a stage contradicts its forecasts, and go on if `goes_on`, which gets the question,
    says so. Raises UserError if not."""
    decided = any(s.exact for s in study.plan.stages if s.number > stage.number)
    accepted = [e.get("stage") for e in study.events if e["kind"] == ACCEPTED]
    if decided or stage.number in accepted or not (judged := judgement(study, stage)):
        return
    if not judged.is_contradicted:
        return
    log(
        f"Warning: stage {stage.number} contradicts its forecasts: {judged}. Either losses follow "
        "another law from here on, or these runs have a fault (learning rate, data, batch). Later "
        "forecasts know these errors, so their intervals are wider."
    )
    if not goes_on("Go on with the next stage?"):
        problem = f"contradicts its forecasts: {judged}"
        todo = f"see forescale study score study={study.folder.name}; to go on, add {GO_ON}"
        raise UserError(f"stage {stage.number} of {study.folder}", problem, todo)
    study.event(ACCEPTED, stage=stage.number)
