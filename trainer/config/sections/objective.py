"""The pretraining objectives: their names, and the config section.

To add an objective, write a file in data/ with its class (see data/objective.py for the protocol)
and a line in OBJECTIVES here. Invariant: imports no torch.
"""

# ruff: noqa: RUF009 (key makes fields, as dataclasses.field does)

from dataclasses import dataclass
from typing import Any

from forescale.config.job import Problems
from forescale.config.schema import TargetConfig, key
from forescale.config.suggest import nearest_first

OBJECTIVES = {"next_token": "forescale.data.objective.NextToken"}


@dataclass
class ObjectiveConfig:
    kind: str = key("next_token", f"the pretraining objective: {', '.join(OBJECTIVES)}, or own")
    target: str | None = key(
        None,
        "own: your class, such as mypackage.MyObjective (see data/objective.py)",
        name="_target_",
    )
    arguments: dict[str, Any] = key({}, "own: keyword arguments of your class")

    @property
    def is_next_token(self) -> bool:
        return self.kind == "next_token"

    @property
    def class_name(self) -> str:
        """The dotted name of the objective's class."""
        return self.target or OBJECTIVES[self.kind]

    def problems(self) -> Problems:
        if self.kind == "own":
            return TargetConfig(self.target or "").problems()
        if self.kind not in OBJECTIVES:
            near = ", ".join(nearest_first(self.kind, [*OBJECTIVES, "own"]))
            return [("kind", f"{self.kind!r} is no objective", f"choose one of {near}")]
        if self.target:
            todo = "write objective.kind=own, or take it out"
            return [("_target_", f"{self.kind} has no such setting", todo)]
        return []
