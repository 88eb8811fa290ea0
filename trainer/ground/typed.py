"""Stored metadata as typed values: JSON of anybody's becomes the type that its reader declares, or
one sentence.

    @dataclass                     class Launch(TypedDict, total=False):
    class Parent:                      begun: Number
        step: Count                    nodes: list[str]

Invariant: what comes back has the declared types, down to the last item. Whole numbers fit 64 bits.
Nothing is converted but lists to tuples: "3" and true are no numbers. A TypedDict is the stored
value itself, with its further keys. Imports pydantic, which does the work, when it is first needed.
"""

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, TypeVar

from typing_extensions import is_typeddict

from forescale.ground.errors import UserError, shortened

T = TypeVar("T")
RESTORE = "restore the file from a copy"
_LONGEST = 60  # characters of a wrong value
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "dataclass": "a mapping",
}


class _Exact:
    """An annotation: a value of this very type, and no text that reads like one. rules: of
    pydantic-core's schema, such as ge."""

    def __init__(self, **rules: Any):
        self.rules = rules

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        return {**handler(source), "strict": True, **self.rules}


class Built:
    """An annotation: what a function makes of a stored value. function: raises ValueError for one
    that is wrong."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        return {
            "type": "function-plain",
            "function": {"type": "no-info", "function": self.function},
        }


Count = Annotated[int, _Exact(ge=0, le=2**63 - 1)]  # of things; an index
Size = Annotated[int, _Exact(ge=1, le=2**63 - 1)]  # of something that isn't empty
Whole = Annotated[int, _Exact(ge=-(2**63), le=2**63 - 1)]
Number = Annotated[float, _Exact(allow_inf_nan=False)]
# So that no product of some of them is infinite or 0.
Positive = Annotated[float, _Exact(ge=1e-40, le=1e40, allow_inf_nan=False)]
Share = Annotated[float, _Exact(ge=0, lt=1)]
AnyNumber = Annotated[float, _Exact()]  # NaN and infinities too
Moment = Annotated[float, _Exact(ge=0, lt=253_402_300_800)]  # seconds, until 9999
TokenId = Annotated[int, _Exact(ge=0, lt=2**31)]
Flag = Annotated[bool, _Exact()]


def typed(kind: type[T], value: Any, where: str, todo: str = RESTORE) -> T:
    """Return a value as JSON has it (dicts, lists, scalars) as `kind`. Raises UserError with the
    place of the first value of another type."""
    from pydantic import ValidationError

    try:
        result: T = _adapter(kind).validate_python(value)  # type: ignore[arg-type]
    except ValidationError as e:
        fault = e.errors(include_url=False, include_context=False)[0]
        place = ".".join(p for p in map(str, fault["loc"]) if "[" not in p)  # of unions
        name = shortened(place, _LONGEST) if place else "its content"
        if fault["type"] == "missing":
            raise UserError(where, f"has no {name}", todo) from None
        word = _EXPECTED.get(fault["type"].partition("_")[0])
        rule = fault["msg"].removeprefix("Value error, ")
        rule = f"not {word}" if word else rule[0].lower() + rule[1:]
        problem = f"is damaged: {name} is {_described(fault['input'])}, {rule}"
        raise UserError(where, problem, todo) from None
    return value if is_typeddict(kind) else result


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _described(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return shortened(repr(value), _LONGEST)
