"""Stored values as the types that their reader declares."""

from dataclasses import dataclass
from typing import NotRequired

import pytest
from typing_extensions import TypedDict

from forescale.ground.errors import UserError
from forescale.ground.typed import AnyNumber, Count, Flag, Moment, Number, typed


@dataclass(frozen=True)
class Place:
    step: Count
    spans: tuple[tuple[Count, Count], ...] = ()


class Record(TypedDict):
    place: Place
    begun: Moment
    is_done: Flag
    loss: NotRequired[AnyNumber]
    seconds: NotRequired[dict[str, Number]]


GOOD = {"place": {"step": 3, "spans": [[1, 2]]}, "begun": 1, "is_done": False, "later": [1]}


def test_lists_become_tuples_and_further_keys_fall_away():
    assert typed(Place, {"step": 3, "spans": [[1, 2]], "new": 1}, "f") == Place(3, ((1, 2),))


def test_a_typed_dict_is_the_value_itself():
    assert typed(Record, GOOD, "f") is GOOD


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"place": None}, "place is null, not a mapping"),
        ({"place": {}}, "has no place.step"),
        ({"place": {"step": "3"}}, "place.step is '3', not a whole number"),
        ({"place": {"step": True}}, "place.step is true, not a whole number"),
        ({"place": {"step": 3.0}}, "place.step is 3.0, not a whole number"),
        ({"place": {"step": -1}}, "place.step is -1"),
        ({"place": {"step": 2**63}}, "place.step is 9223372036854775808"),
        ({"place": {"step": 1, "spans": [[1]]}}, "has no place.spans.0.1"),
        ({"begun": 1e300}, "begun is 1e+300"),
        ({"is_done": 0}, "is_done is 0, not true or false"),
        ({"loss": "x" * 500}, "loss is 'xxx"),
        ({"seconds": {"data": float("inf")}}, "seconds.data is inf"),
        ({"seconds": [[[]]]}, "seconds is a list of 1, not a mapping"),
    ],
)
def test_a_value_of_another_type_is_one_sentence_with_its_place(change, words):
    with pytest.raises(UserError) as error:
        typed(Record, GOOD | change, "f")
    sentence = str(error.value)
    assert words in sentence
    assert sentence.startswith("f: ")
    assert len(sentence) < 200


def test_nan_is_a_number_only_where_it_may_be():
    assert typed(Record, GOOD | {"loss": float("nan")}, "f")
    with pytest.raises(UserError):
        typed(Record, GOOD | {"seconds": {"data": float("nan")}}, "f")
