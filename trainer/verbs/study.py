"""`forescale study ACTION`: train runs by a plan, fit a scaling law, predict a bigger run.

Invariant: an action gets only keys that it reads (scaling/actions/); any other key is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from forescale.config.compose import compose
from forescale.config.job import Action, overrides_of
from forescale.config.schema import leaves
from forescale.ground.errors import UserError
from forescale.scaling.actions import ACTIONS, FILES
from forescale.scaling.config import StudyJob
from forescale.scaling.study.directory import settings


@dataclass
class StudyCommand(StudyJob):
    """All keys of `forescale study`, with its actions."""

    ACTIONS: ClassVar[Mapping[str, Action]] = ACTIONS


JOB = StudyCommand
EXAMPLES = tuple(example for action in ACTIONS.values() for example in action.examples)


def main(arguments: list[str]) -> int:
    """Run one action of a study and return the exit code."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    words, after = arguments[:at], arguments[at + 1 :]
    name, rest = (words[0], words[1:]) if words else ("", [])
    if name not in ACTIONS:
        if "=" not in name:
            todo = f"write forescale study ACTION; the actions are {', '.join(ACTIONS)}"
            problem = "is no action of a study" if name else "needs an action"
            raise UserError(name or "study", problem, todo)
        name, rest = "fit", words
    overrides = overrides_of(StudyJob, rest)
    refuse_other_keys(name, overrides)
    job = compose(StudyJob, overrides)
    if name != "plan":
        job = settings(job, overrides)
    if after:
        if not hasattr(FILES[name], "with_arguments"):
            takers = " and ".join(n for n, file in FILES.items() if hasattr(file, "with_arguments"))
            problem = f"study {name} takes no arguments after it"
            raise UserError("--", problem, f"only {takers} take some")
        job = FILES[name].with_arguments(job, after)
    code: int = FILES[name].main(job)
    return code


def refuse_other_keys(name: str, overrides: Sequence[str]) -> None:
    """Raise UserError for a key that this action does not read, naming the actions that do."""
    known = leaves(StudyJob)
    for override in overrides:
        path = override.partition("=")[0]
        if path in known and not ACTIONS[name].reads(path):
            users = ", ".join(other for other, action in ACTIONS.items() if action.reads(path))
            problem = f"is no key of forescale study {name}"
            raise UserError(path, problem, f"leave it out; the actions with this key are {users}")
