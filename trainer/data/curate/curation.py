"""What a curation does: its steps in their order, and its settings.

Invariant: equal settings, step versions and documents keep equal texts.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from forescale.data.curate import minhash, substrings
from forescale.data.curate.duplicates import Duplicates
from forescale.data.curate.earlier import Earlier
from forescale.data.curate.step import Step
from forescale.data.curate.steps import STEPS
from forescale.data.curate.steps.inputs import versions
from forescale.data.curate.substrings import Substrings


@dataclass(frozen=True)
class Keep:
    """Nothing is looked for."""


NEAR = {"keep": Keep, "drop": Duplicates}
PASSAGES = {"keep": Keep, "cut": Substrings}


@cache
def step_classes() -> Mapping[str, type]:
    """Return the class of each step by its name."""
    classes = {}
    for name, place in STEPS.items():
        module, _, of = place.partition(":")
        classes[name] = getattr(import_module(f"forescale.data.curate.steps.{module}"), of)
    return classes


@dataclass(frozen=True)
class Curation:
    """The steps that each document goes through, and what is done with the documents they keep."""

    # what each document goes through, in this order: a name, or {kind: name, SETTING: VALUE}
    steps: list[Step] = field(default_factory=list, metadata={"kinds": step_classes})
    # near-duplicates, by MinHash: keep them, or {kind: drop, stays: longest, ...}
    near_duplicates: Keep | Duplicates = field(default_factory=Keep, metadata={"kinds": NEAR})
    # passages of 50 words and more that occurred before: keep them, or {kind: cut, words: 50}
    repeated_passages: Keep | Substrings = field(default_factory=Keep, metadata={"kinds": PASSAGES})
    # datasets that were built before: what they hold goes, and what this one keeps is a new source
    against: list[str] = field(default_factory=list)
    url_key: str = "url"  # field of a JSON line, or column of a table, with a document's address
    # number of documents that the report shows of each reason for which a step drops them
    samples: int = field(default=5, metadata={"bounds": {"ge": 0, "le": 100}})

    def problems(self) -> list[tuple[str, str, str]]:
        """Return a problem for each step whose settings are wrong."""
        from forescale.ground.errors import UserError

        problems = []
        parts: list[tuple[str, str, Any]] = [  # key, how its messages begin
            (f"steps.{number}", name.partition(" ")[0], step)
            for number, (name, step) in enumerate(zip(self.names, self.steps, strict=True))
        ]
        parts += [("near_duplicates", "", self.near), ("repeated_passages", "", self.passages)]
        for key, step, part in parts:
            try:
                getattr(part, "check", lambda: None)()
            except UserError as e:
                problem = e.problem
                if not step:
                    key = f"{key}.{e.where}"
                elif e.where.startswith(f"{step}."):
                    key += e.where.removeprefix(step)
                elif e.where != step:  # a file
                    problem = f"{e.where} {problem}"
                problems.append((key, problem, e.todo))
        scores = [getattr(step, "attribute", "") for step in self.steps]
        if self.near and self.near.stays == "score" and "score" not in scores:
            todo = "add the step classifier, whose attribute is score, or choose first or longest"
            problems.append(("near_duplicates.stays", "no step gives a score", todo))
        if self.against and self.near and not self.near.across_sources:
            todo = "leave near_duplicates.across_sources out"
            problems.append(("against", "compares all inputs with the earlier datasets", todo))
        return problems

    @property
    def is_empty(self) -> bool:
        """True if it does nothing."""
        return not (self.steps or self.compares)

    @property
    def compares(self) -> bool:
        """True if documents are compared with each other after the steps."""
        return bool(self.near or self.passages or self.against)

    @property
    def near(self) -> Duplicates | None:
        """How near-duplicates are found; None if they stay."""
        return self.near_duplicates if isinstance(self.near_duplicates, Duplicates) else None

    @property
    def passages(self) -> Substrings | None:
        """How repeated passages are found; None if they stay."""
        return self.repeated_passages if isinstance(self.repeated_passages, Substrings) else None

    @property
    def names(self) -> list[str]:
        """The names of the steps; a second one of a kind has a number."""
        words = {cls: name for name, cls in step_classes().items()}
        names: list[str] = []
        for step in self.steps:
            name = words[type(step)]
            count = sum(known.split(" ")[0] == name for known in names)
            names.append(f"{name} {count + 1}" if count else name)
        return names

    def describe(self) -> dict[str, Any]:
        """Return the settings and versions of all steps, as the dataset's manifest has them: of
        files that a step reads the content, not where they are."""
        steps = []
        for name, step in zip(self.names, self.steps, strict=True):
            settings = asdict(step)  # type: ignore[call-overload]
            if hasattr(step, "fingerprint"):  # of what its `files` hold
                settings["files"] = step.fingerprint()
            for key in getattr(step, "FILES", ()):
                settings[key] = _content(settings[key])
            if hasattr(step, "packages"):
                settings["packages"] = versions(step.packages())
            steps.append({"step": name, "version": type(step).VERSION, **settings})
        described: dict[str, Any] = {"steps": steps, "url_key": self.url_key}
        described["samples"] = self.samples
        if self.near is not None:
            described["near_duplicates"] = {"version": minhash.version(), **asdict(self.near)}
        if self.passages is not None:
            described["repeated_passages"] = {
                "version": substrings.VERSION, **asdict(self.passages)}  # fmt: skip
        if self.against:
            described["against"] = Earlier(tuple(self.against)).describe()
        return described


def _content(value: Any) -> Any:
    """Return the name of a file and a hash of its bytes, for each of some paths."""
    if isinstance(value, list | tuple):
        return [_content(one) for one in value]
    if not value:
        return value
    with open(value, "rb") as file:
        return f"{Path(value).name} {hashlib.file_digest(file, 'sha256').hexdigest()}"
