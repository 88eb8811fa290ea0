"""Sizes, the type of numbers of ranks or nodes that may change during a run: 4, or "2-8".

Invariant: `Sizes.parse(str(s)) == s`; a single number is stored as a number.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple


@dataclass(frozen=True)
class Sizes:
    """All whole numbers from `least`, at least 1, to `most`."""

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= 2**20:
            problem = "expects 1 or more, the smaller number first"
            raise ValueError(f"{problem}, got {self.least}-{self.most}")

    @classmethod
    def parse(cls, value: "str | int | Sizes") -> "Sizes":
        """Return the numbers that `value` describes. Raises ValueError with what is wrong."""
        if isinstance(value, Sizes):
            return value
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", str(value), re.ASCII)
        if isinstance(value, bool) or not match:
            raise ValueError(f"expects a whole number, or two such as 2-8, got {value!r}")
        return cls(int(match[1]), int(match[2] or match[1]))

    @property
    def is_range(self) -> bool:
        return self.least < self.most

    @property
    def plain(self) -> int | str:
        """As YAML holds it."""
        return str(self) if self.is_range else self.most

    def __iter__(self) -> Iterator[int]:
        """The numbers, the largest first."""
        return iter(range(self.most, self.least - 1, -1))

    def __str__(self) -> str:
        return f"{self.least}-{self.most}" if self.is_range else f"{self.most}"


class SizeRange(NamedTuple):
    """The numbers of ranks, or of nodes, that a key of a job allows. each: ranks of one."""

    key: str
    sizes: Sizes
    each: int = 1


def in_words(sizes: Sequence[int]) -> str:
    """Return sizes, the largest first, as a phrase: 16, 5-8 or 2."""
    phrases: list[str] = []
    for _, group in groupby(enumerate(sizes), key=sum):
        run = [n for _, n in group]
        phrases += [f"{run[-1]}-{run[0]}"] if run[2:] else map(str, run)
    *others, last = phrases
    return f"{', '.join(others)} or {last}" if others else last
