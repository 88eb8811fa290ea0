"""The accuracy of a model on a task, after so many solved examples in its context.

    <begin> question -> answer \\n ... question -> | answer \\n

Invariant: an answer counts if each of its tokens, the line end included, is the most likely one
after the tokens before it: exactly when greedy decoding would write it. Question i of a task is the
same for all models and numbers of examples, so that accuracies compare in pairs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from forescale.abilities.tasks import QUESTIONS, SHOTS, TASKS
from forescale.progress import Progress, silent

Logits = Callable[[Tensor], Tensor]  # (B, L) int64 -> (B, L, V)
Encode = Callable[[str], list[int]]
_ARROW = " ->"


@dataclass(frozen=True)
class Accuracy:
    """right: of `questions`; low, high: the 90 % interval of the share (Wilson 1927); nats: the
    mean loss of an answer, summed over its tokens, which moves long before the accuracy does.
    None in place of this: the examples don't fit the model's context."""

    task: str
    shots: int
    right: int
    questions: int
    nats: float

    @property
    def share(self) -> float:
        """The share of right answers."""
        return self.right / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """The 90 % interval of the share."""
        return interval_of(self.right, self.questions)


def interval_of(right: int, questions: int) -> tuple[float, float]:
    """Return the 90 % interval of the share right / questions (Wilson 1927)."""
    n, p, z = questions, right / questions, NormalDist().inv_cdf(0.95)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def accuracies(
    logits: Logits,
    encode: Encode,
    begin: int,
    length: int,
    tasks: Sequence[str],
    shots: Sequence[int] = SHOTS,
    *,
    questions: int = QUESTIONS,
    rows: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Iterator[tuple[str, int, Accuracy | None]]:
    """Yield the accuracy of each task and number of examples.

    encode: text to ids; begin: the id that begins a document; length: the most tokens of a row;
    rows: of a forward pass.
    """
    total, done = len(tasks) * len(shots) * questions, 0
    for task in tasks:
        for count in shots:
            made = [_row(task, i, count, encode, begin, seed) for i in range(questions)]
            if max(len(ids) for ids, _ in made) > length:
                done += questions
                yield task, count, None
                continue
            right, nats = 0, 0.0
            for first in range(0, questions, rows):
                part = made[first : first + rows]
                own, lost = _judged(logits, part, device)
                right, nats, done = right + own, nats + lost, done + len(part)
                progress("abilities", done, total, "questions")
            yield task, count, Accuracy(task, count, right, questions, nats / questions)


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


def _judged(
    logits: Logits, made: list[tuple[list[int], int]], device: torch.device | str
) -> tuple[int, float]:
    """Return how many answers are right, and the nats of all."""
    width = max(len(ids) for ids, _ in made)
    # Padding behind a row changes nothing before it: the model is causal.
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in made], device=device)
    found, right, nats = logits(tokens), 0, 0.0
    for row, (ids, count) in enumerate(made):
        at = slice(len(ids) - count - 1, len(ids) - 1)
        known = found[row, at].float().log_softmax(-1)
        target = tokens[row, len(ids) - count : len(ids)]
        right += bool((known.argmax(-1) == target).all())
        nats -= float(known.gather(-1, target[:, None]).sum())
    return right, nats
