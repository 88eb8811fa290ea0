"""Duration, the type of lengths: "500 steps", "2e9 tokens", "30 min", "10 %" (of the run).

Invariant: `Duration.parse(str(d)) == d`, and equal lengths in one unit are equal objects: between
two configs, "30 min" and "1800 s" are not a change.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from forescale.ground.errors import shortened

_UNITS: dict[str, tuple[str, int]] = {
    **dict.fromkeys(("", "step", "steps"), ("steps", 1)),
    **dict.fromkeys(("token", "tokens"), ("tokens", 1)),
    **dict.fromkeys(("%", "percent"), ("percent", 1)),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1)),
    **dict.fromkeys(("min", "minute", "minutes"), ("seconds", 60)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600)),
    **dict.fromkeys(("d", "day", "days"), ("seconds", 86400)),
}
_FORM = re.compile(r"\s*([0-9._]+(?:e[+-]?[0-9]+)?)\s*(%|[a-z]*)\s*", re.IGNORECASE)
# Times as SLURM writes them: m:s, h:m:s, d-h, d-h:m and d-h:m:s.
_CLOCK = re.compile(r"\s*(?:(\d{1,9})-(?=\d+(?::\d+){0,2}\s*$))?(\d{1,9}(?::\d{1,9}){0,2})\s*")
_LONGEST = 1e18  # of any unit; whole seconds, steps and tokens fit 64 bits
EXAMPLES = '"500 steps", "2e9 tokens", "30 min" or "10 %"'
_TIMES = '"30 min", "24 h" or 1-00:00:00'


@dataclass(frozen=True)
class Duration:
    """A length of at least 0; steps and tokens are whole numbers."""

    amount: float
    unit: Literal["steps", "tokens", "seconds", "percent"] = "steps"

    def __post_init__(self) -> None:
        if not self.amount >= 0:
            raise ValueError("a length must be at least 0")
        if self.amount > _LONGEST:
            raise ValueError(f"a length must be at most {_LONGEST:g} {self.unit}")
        if self.unit in ("steps", "tokens") and self.amount != int(self.amount):
            raise ValueError(f"{self.amount:g} is not a whole number of {self.unit}")

    @classmethod
    def parse(cls, value: "str | int | float | Duration", wall_time: bool = False) -> "Duration":
        """Return the length that `value` describes; a plain number means steps.

        wall_time: it must be one, and may be written as SLURM does, such as 1-12:00:00. Raises
        ValueError with what is wrong.
        """
        if wall_time:
            return cls._wall_time(value)
        if isinstance(value, Duration):
            return value
        match = _FORM.fullmatch(str(value))
        if isinstance(value, bool) or not match or match[2].lower() not in _UNITS:
            got = "null" if value is None else shortened(repr(value), 200)
            raise ValueError(f"expects a length such as {EXAMPLES}, got {got}")
        unit, factor = _UNITS[match[2].lower()]
        try:
            amount = float(match[1])
        except ValueError:
            raise ValueError(f"{match[1]!r} is not a number") from None
        return cls(amount * factor, unit)  # type: ignore[arg-type]

    @classmethod
    def _wall_time(cls, value: "str | int | float | Duration") -> "Duration":
        match = _CLOCK.fullmatch(str(value))
        if match and (match[1] or ":" in match[2]):
            parts = [int(part) for part in match[2].split(":")]
            if match[1] is None:  # minutes and seconds
                parts = [0] * (3 - len(parts)) + parts
            hours, minutes, seconds = [*parts, 0, 0][:3]
            total = ((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
            return cls(total, "seconds")
        got = "null" if value is None else shortened(repr(value), 200)
        if isinstance(value, int | float) and type(value) is not bool:
            got += " without a unit (of 24:00:00 without quotes, YAML makes such a number)"
        try:
            length = cls.parse(value)
        except ValueError:
            length = cls(0)
        if length.unit != "seconds":
            raise ValueError(f"must be a wall time such as {_TIMES}, got {got}")
        return length

    def __str__(self) -> str:
        amount, name = self.amount, self.unit.replace("percent", "%").replace("seconds", "s")
        for unit, factor in (("h", 3600), ("min", 60)):
            if self.unit == "seconds" and amount and amount % factor == 0:
                amount, name = amount / factor, unit
                break
        short = f"{amount:g}".replace("e+0", "e").replace("e+", "e")
        exact = str(int(amount)) if amount == int(amount) else repr(amount)
        text = short if float(short) == amount else exact
        return f"{text} {name[:-1] if amount == 1 and name.endswith('s') and name != 's' else name}"

    def steps(self, tokens_per_step: int, total_steps: int) -> int | None:
        """Return the length in optimizer steps, rounded up; None if it is a wall time."""
        exact = Fraction(repr(float(self.amount)))
        match self.unit:
            case "steps":
                return int(self.amount)
            case "tokens":
                return math.ceil(exact / tokens_per_step)
            case "percent":
                return math.ceil(exact * total_steps / 100)
            case _:
                return None

    @property
    def seconds(self) -> float | None:
        """The wall time in seconds; None if the length is in steps, tokens or percent."""
        return self.amount if self.unit == "seconds" else None
