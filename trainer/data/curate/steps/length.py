"""`length`: documents of other lengths are dropped."""

from dataclasses import dataclass
from typing import ClassVar

from forescale.data.curate.step import Draft
from forescale.data.curate.steps.inputs import ranges
from forescale.ground.errors import UserError


@dataclass(frozen=True)
class Length:
    """Drops documents with fewer or more characters, words or bytes (of UTF-8) than given; null is
    no bound. Words are what white space divides. No published rule: all bounds are the user's."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "bounds of the user"

    least_characters: int | None = None
    most_characters: int | None = None
    least_words: int | None = None
    most_words: int | None = None
    least_bytes: int | None = None
    most_bytes: int | None = None

    def check(self) -> None:
        if all(value is None for value in vars(self).values()):
            todo = "give least_characters, or another"
            raise UserError("length", "has no bound, so it keeps every document", todo)
        ranges(
            "length",
            characters=(self.least_characters, self.most_characters),
            words=(self.least_words, self.most_words),
            bytes=(self.least_bytes, self.most_bytes),
        )

    def __call__(self, draft: Draft) -> str | None:
        text = draft.text
        if reason := _outside(len(text), "characters", self.least_characters, self.most_characters):
            return reason
        if not (self.least_words is None and self.most_words is None):
            number = len(text.split())
            if reason := _outside(number, "words", self.least_words, self.most_words):
                return reason
        if self.least_bytes is None and self.most_bytes is None:
            return None
        number = len(text.encode("utf-8", "surrogatepass"))
        return _outside(number, "bytes", self.least_bytes, self.most_bytes)


def _outside(number: int, unit: str, least: int | None, most: int | None) -> str | None:
    if least is not None and number < least:
        return f"too few {unit}"
    return f"too many {unit}" if most is not None and number > most else None
