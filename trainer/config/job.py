"""The base of every verb's job: a dataclass that says which keys its verb takes.

Invariant: a verb's job is all that the command line, its help and shell completion know of its
keys. A field that is a section has keys of its own.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from dataclasses import dataclass
from typing import ClassVar

from forescale.config.schema import key, section

Problems = list[tuple[str, str, str]]  # (key, what is wrong, what to do)


class Job:
    """What a verb is asked to do.

    VERB: the verb's name, and that of its primary config, conf/VERB.yaml, where it has one (a verb
    without groups of choices needs none: its fields have the defaults). TARGET: the key that a bare
    word after the verb fills, "" where there is none.
    """

    VERB: ClassVar[str] = ""
    TARGET: ClassVar[str] = ""


@dataclass
class RootConfig:
    root: str = key("runs", "the directory that holds the runs")


@dataclass
class RunJob(Job):
    """The job of a verb that works on one run that exists."""

    TARGET: ClassVar[str] = "target"

    target: str | None = key(None, "a run (its name or its directory)")
    run: RootConfig = section(RootConfig, "where the runs live")

    def problems(self) -> Problems:
        if self.target:
            return []
        return [("target", "names nothing", f"give a run or a path: forescale {self.VERB} first")]
