"""`forescale schema`: JSON Schema of the verbs, for programs: their keys, and what they print.

`$defs` has for each verb, action or kind, such as `plan`, `study fit` or `submit eval`, the schema
of its keys by that name, that of what it prints by the name with ` --json`, and `error`.
"""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from forescale.config.compose import parse
from forescale.config.job import Job
from forescale.config.json_schema import DRAFT, arguments, document, error
from forescale.ground.document import is_json, tell
from forescale.ground.errors import DONE
from forescale.verbs import VERBS, load


@dataclass
class SchemaJob(Job):
    """The verb to describe."""

    VERB: ClassVar[str] = "schema"
    TARGET: ClassVar[str] = "verb"
    PRINTS: ClassVar = {"$schema": str, "$defs": dict[str, dict]}

    verb: str | None = None  # a verb; null: all


JOB = SchemaJob
EXAMPLES = ("schema plan", "schema > forescale.json   (all verbs)")


def main(arguments: list[str]) -> int:
    verb = parse(SchemaJob, arguments).verb
    schemas = {"error": error()}
    for name in VERBS if verb is None else [verb]:
        schemas |= schemas_of(name)
    facts = {"$schema": DRAFT, "$defs": schemas}
    tell(facts)
    if not is_json():
        print(json.dumps(facts, indent=2))
    return DONE


def schemas_of(verb: str) -> dict[str, dict[str, Any]]:
    """Return the schemas of a verb, by the names that $defs gives them. Raises UserError."""
    file, result = load(verb), dict[str, dict[str, Any]]()
    jobs = {verb: file.JOB, **{f"{verb} {w}": j for w, j in getattr(file, "JOBS", {}).items()}}
    for name, job in jobs.items():
        purpose = VERBS[verb] if job is file.JOB else str(job.__doc__)
        for action, facts in job.ACTIONS.items():
            result[f"{name} {action}"] = arguments(job, facts.purpose, action)
            result[f"{name} {action} --json"] = document(facts.prints, facts.lines)
        if not job.ACTIONS:
            result[name] = arguments(job, purpose)
            result[f"{name} --json"] = document(job.PRINTS, job.LINES)
    return result
