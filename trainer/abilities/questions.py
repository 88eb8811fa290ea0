"""Questions of the tasks as rows of tokens, each after so many solved examples.

    <begin> question -> answer \\n ... question -> | answer \\n

Invariant: question i of a task is the same for all models and numbers of examples, so that
accuracies compare in pairs. Imports no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from forescale.abilities.tasks import QUESTIONS, TASKS
from forescale.errors import UserError

Encode = Callable[[str], list[int]]
_ARROW = " ->"
ROWS = 8  # of a forward pass in training


@dataclass(frozen=True)
class Questions:
    """The questions of one task after so many examples: rows of tokens, each with the number of its
    last ones that are the answer."""

    task: str
    shots: int
    rows: list[tuple[list[int], int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(ids) for ids, _ in self.rows)


@dataclass(frozen=True)
class Passes:
    """The forward passes that answer questions: `count` of them, all with `rows` rows of `width`
    tokens, padding included."""

    count: int
    rows: int
    width: int

    def of_each(self, ranks: int) -> int:
        """Return the passes of each of `ranks` ranks, which answer together: all make as many,
        because a pass may be a collective."""
        return -(-self.count // ranks)

    def tokens(self, ranks: int) -> int:
        """Return the tokens that all ranks compute."""
        return self.of_each(ranks) * ranks * self.rows * self.width


def passes_of(found: Sequence[Questions], rows: int, multiple: int = 1) -> Passes:
    """Return the passes of `rows` rows that answer the questions; multiple: what their columns are
    a multiple of."""
    longest, total = max(each.longest for each in found), sum(len(each.rows) for each in found)
    return Passes(-(-total // rows), rows, -(-longest // multiple) * multiple)


def questions_of(
    encode: Encode,
    begin: int,
    tasks: Sequence[str],
    shots: Sequence[int],
    *,
    questions: int = QUESTIONS,
    seed: int = 0,
) -> list[Questions]:
    """Return the questions of each task at each number of examples.

    encode: text to ids; begin: the id that begins a document.
    """
    return [
        Questions(task, n, [_row(task, i, n, encode, begin, seed) for i in range(questions)])
        for task in tasks
        for n in shots
    ]


def expect_fitting(found: Sequence[Questions], length: int, key: str, limit: str) -> None:
    """Raise UserError if rows of `length` tokens are too short for some questions. key, limit: the
    config's keys of the examples and of the length, for the sentence."""
    for each in found:
        if each.longest > length:
            problem = (
                f"{each.shots} examples of {each.task} and a question need {each.longest} tokens"
            )
            todo = f"give fewer examples, or {limit} of at least {each.longest}"
            raise UserError(key, f"{problem}, and {limit} is {length}", todo)


def _row(
    task: str, number: int, shots: int, encode: Encode, begin: int, seed: int
) -> tuple[list[int], int]:
    """Return a row of tokens, and how many of its last are the answer."""
    make = TASKS[task].make
    which = [*TASKS].index(task)
    ids, answer_ids = [begin], list[int]()
    # The question first: it doesn't depend on the number of examples.
    asked = make(np.random.default_rng([seed, which, number]))
    examples = np.random.default_rng([seed, which, number, 1])
    for question, answer in [*(make(examples) for _ in range(shots)), asked]:
        answer_ids = encode(f" {answer}\n")
        ids += encode(question + _ARROW) + answer_ids
    return ids, len(answer_ids)
