"""Small tasks whose questions are made from random numbers, as rows of tokens:

    <begin> question -> answer \\n ... question -> | answer \\n

Invariant: a task is one function here and one line of TASKS. Question i of a task is the same for
all models, machines and numbers of examples, so that accuracies compare in pairs. The config reads
this file, so it imports numpy only where questions are made.
"""

from collections.abc import Callable
from string import ascii_lowercase
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from numpy.random import Generator as Rng

Encode = Callable[[str], list[int]]
SHOTS = (0, 1, 2, 4, 8, 16)  # solved examples before a question
QUESTIONS = 128

_ARROW = " ->"
_LETTERS = list(ascii_lowercase)
_LENGTH = 5  # letters of a word
_PAIRS = 4  # of a recall


class Task(NamedTuple):
    """make: random numbers -> (question, answer), each one line of text. chance: the accuracy of
    guesses in the right form."""

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
    index = int(rng.integers(_PAIRS))
    pairs = ", ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True))
    return f"{pairs}; {keys[index]}", str(values[index])


TASKS = {
    "copy": Task(_copy, 26.0**-_LENGTH, f"write the same {_LENGTH} letters"),
    "reverse": Task(_reverse, 26.0**-_LENGTH, f"write {_LENGTH} letters backwards"),
    "addition": Task(_addition, 1 / 10, "add two digits modulo 10"),
    "recall": Task(_recall, 1 / _PAIRS, f"give the value of one of {_PAIRS} keys"),
}


def question_row(
    task: str, number: int, shots: int, encode: Encode, begin: int, seed: int
) -> tuple[list[int], int]:
    """Return question `number` of a task after `shots` examples: a row of tokens, and how many of
    its last are the answer. encode: text to ids; begin: the id that begins a document."""
    from numpy.random import default_rng

    make, index = TASKS[task].make, [*TASKS].index(task)
    ids, answer_ids = [begin], list[int]()
    # The question first: it doesn't depend on the number of examples.
    question = make(default_rng([seed, index, number]))
    rng = default_rng([seed, index, number, 1])
    for text, answer in [*(make(rng) for _ in range(shots)), question]:
        answer_ids = encode(f" {answer}\n")
        ids += encode(text + _ARROW) + answer_ids
    return ids, len(answer_ids)
