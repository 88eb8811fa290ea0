"""Which rows of JSON lines and tables are read, by the values of their fields.

    {score: {least: 0.8}}    {score: {least: 0.5, below: 0.8}}    {domain: [a.org, b.org]}
    {domain: {not: [a.org]}}

Invariant: a row is read if every named field has a value that its rule allows; a row without the
field isn't, so a rule and its opposite share out the rows that have it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from forescale.ground.errors import UserError

_NUMBERS, _VALUES = ("least", "below"), ("of", "not")


class Where:
    """Rules by field; without any, all rows are read."""

    def __init__(self, rules: Mapping[str, Any]):
        """Raises UserError for a rule that isn't one."""
        self.rules = {key: _rule(key, value) for key, value in rules.items()}

    def reads(self, value_at: Callable[[str], Any]) -> bool:
        """Return whether a row is read. value_at: returns the value of a field, None without it."""
        return all(_allows(rule, value_at(key)) for key, rule in self.rules.items())


def _rule(key: str, value: Any) -> dict[str, Any]:
    rule = dict(value) if isinstance(value, Mapping) else {"of": value}
    for name, bound in rule.items():
        if name in _VALUES:
            items = bound if isinstance(bound, list | tuple) else [bound]
            rule[name] = [str(item) for item in items]
        elif name not in _NUMBERS or _number(bound) is None:
            todo = "write such as {score: {least: 0.5, below: 0.8}}, {domain: [a.org]} "
            raise UserError(
                f"where.{key}", f"{name}: {bound!r} is no rule", todo + "or {not: [a.org]}"
            )
    return rule


def _allows(rule: dict[str, Any], value: Any) -> bool:
    if value is None or ("of" in rule and str(value) not in rule["of"]):
        return False
    if "not" in rule and str(value) in rule["not"]:
        return False
    number = _number(value) if "least" in rule or "below" in rule else 0.0
    if number is None:
        return False
    least, below = (
        float(rule.get(name, end)) for name, end in (("least", "-inf"), ("below", "inf"))
    )
    return least <= number and (number < below or below == float("inf"))


def _number(value: Any) -> float | None:
    try:
        return float(value) if float(value) == float(value) else None
    except (TypeError, ValueError):
        return None
