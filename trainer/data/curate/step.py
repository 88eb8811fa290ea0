"""A step of a curation: it reads a document, may change its text, or drops it with a reason.

Invariant: what a step does with a document depends on that document and the step's settings alone,
so a corpus may be cut among any number of processes and machines. Changes of one document are the
step's own, and are counted by comparing the text before and after.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol


@dataclass
class Draft:
    """A document on its way through the steps.

    name: the same on every machine; text: what the steps before have left; url: where it was
    found, "" if unknown; attributes: what steps found out, such as language="en", quality=0.83.
    """

    name: str
    text: str
    url: str = ""
    attributes: dict[str, str | float] = field(default_factory=dict)


class Step(Protocol):
    """One step: a dataclass, whose fields are its settings."""

    VERSION: ClassVar[int]  # raise it when the step decides otherwise than before
    SOURCE: ClassVar[str]  # where its rules and default values are from
    # FILES: ClassVar[tuple[str, ...]], if some settings are paths: their names. A dataset then
    # depends on what the files hold, not on where they are.
    # def packages(self) -> tuple[str, ...], if what the step does depends on their versions.

    def __call__(self, draft: Draft) -> str | None:
        """Change `draft`, and return None to keep it, or a short reason to drop it. The reason is
        one of a few, without numbers of the document: documents are counted by it."""
