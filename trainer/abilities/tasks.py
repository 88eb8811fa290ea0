"""The tasks: each makes questions with one right answer, all that are needed, from random numbers.

Invariant: a task is one function here and one line of TASKS; equal random numbers give equal
questions, on any machine and for any model. The config reads this file, so it imports no numpy.
"""

from collections.abc import Callable
from string import ascii_lowercase
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from numpy.random import Generator as Rng

SHOTS = (0, 1, 2, 4, 8, 16)  # solved examples before a question
QUESTIONS = 128

_LETTERS = list(ascii_lowercase)
_LENGTH = 5  # letters of a word
_PAIRS = 4  # of a recall


class Task(NamedTuple):
    """make: random numbers -> (question, answer), each one line of text. chance: the accuracy of
    who knows the form of an answer and guesses."""

    make: Callable[["Rng"], tuple[str, str]]
    chance: float
    purpose: str


def _letters(rng: "Rng", count: int, again: bool = True) -> list[str]:
    return [str(letter) for letter in rng.choice(_LETTERS, count, replace=again)]


def _copy(rng: "Rng") -> tuple[str, str]:
    word = " ".join(_letters(rng, _LENGTH))
    return word, word


def _reverse(rng: "Rng") -> tuple[str, str]:
    letters = _letters(rng, _LENGTH)
    return " ".join(letters), " ".join(reversed(letters))


def _addition(rng: "Rng") -> tuple[str, str]:
    a, b = rng.integers(0, 10, 2).tolist()
    return f"{a} + {b} mod 10", str((a + b) % 10)


def _recall(rng: "Rng") -> tuple[str, str]:
    keys, values = _letters(rng, _PAIRS, False), rng.choice(10, _PAIRS, replace=False).tolist()
    asked = int(rng.integers(_PAIRS))
    known = ", ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True))
    return f"{known}; {keys[asked]}", str(values[asked])


TASKS = {
    "copy": Task(_copy, 26.0**-_LENGTH, f"write the same {_LENGTH} letters"),
    "reverse": Task(_reverse, 26.0**-_LENGTH, f"write {_LENGTH} letters backwards"),
    "addition": Task(_addition, 1 / 10, "add two digits modulo 10"),
    "recall": Task(_recall, 1 / _PAIRS, f"give the value of one of {_PAIRS} keys"),
}
