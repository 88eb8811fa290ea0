"""The evaluation of abilities (validation.abilities): its questions, its forward passes, its
results, and their columns in metrics rows and records.

Invariant: nobody else writes or reads the names of these columns. Imports no torch:
train/abilities.py has the passes themselves.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

from forescale.config.abilities import QUESTIONS, SHOTS, Encode, question_row
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError

if TYPE_CHECKING:
    from forescale.data.dataset import Sources

ROWS = 8  # of a forward pass in training
# share: of right answers; nats: mean loss of an answer; of each its standard error.
KINDS = ("share", "stderr", "nats", "nats_stderr")
_SHARE = KINDS[0]  # its column has no suffix
_COLUMN = re.compile(rf"ability/([^/]+)/(0|[1-9]\d*)(?:_({'|'.join(KINDS[1:])}))?")
_Z = NormalDist().inv_cdf(0.95)


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


def questions_of(
    encode: Encode,
    begin: int,
    tasks: Sequence[str],
    shots: Sequence[int] = (),
    questions: int | None = None,
    seed: int = 0,
) -> list[Questions]:
    """Return the questions of each task at each number of examples. encode: text to ids; begin: the
    id that begins a document; shots: none are SHOTS; questions: of each task, None is QUESTIONS."""
    count = questions or QUESTIONS
    return [
        Questions(task, n, [question_row(task, i, n, encode, begin, seed) for i in range(count)])
        for task in tasks
        for n in shots or SHOTS
    ]


def questions_of_job(job: TrainJob, sources: "Sources") -> list[Questions]:
    """Return the questions of a job's evaluations, none without validation.abilities. Raises
    UserError if examples don't fit the training windows, or if there is no held-out text: the
    results stand in its rows."""
    from forescale.data.tokenizer import text_ids  # `status` reads columns without numpy

    validation, tokenizer = job.validation, sources.tokenizer
    if not validation.abilities:
        return []
    if not any(split.num_tokens for split in sources.split("validation").values()):
        problem = "the data has no held-out text, in whose rows the results would stand"
        todo = "leave it out, or make a dataset with validation_fraction above 0"
        raise UserError("validation.abilities", problem, todo)
    questions = questions_of(
        lambda text: text_ids(tokenizer, text),
        sources.end_of_text,
        validation.abilities,
        validation.shots,
        validation.questions,
    )
    length = job.train.sequence_length
    expect_fitting(questions, length, "validation.shots", "train.sequence_length")
    return questions


def prompts_of_job(job: TrainJob, sources: "Sources") -> list[list[int]]:
    """Return the tokens of each of validation.prompts, at the start of a document. Raises UserError
    if a prompt is no text, or if it and what is written don't fit the training windows."""
    from forescale.data.tokenizer import text_ids

    length, count, rows = job.train.sequence_length, job.validation.prompt_tokens, []
    for prompt in job.validation.prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            problem = "a prompt holds half a character (a lone surrogate)"
            raise UserError("validation.prompts", problem, "take it out")
        rows.append([sources.end_of_text, *text_ids(sources.tokenizer, prompt)])
        if len(rows[-1]) + count > length:
            problem = f"{prompt[:40]!r} has {len(rows[-1]):,} tokens, {count:,} are to follow, "
            problem += f"and train.sequence_length is {length:,}"
            todo = "shorten the prompt, or lower validation.prompt_tokens"
            raise UserError("validation.prompts", problem, todo)
    return rows


def expect_fitting(questions: Sequence[Questions], length: int, key: str, limit: str) -> None:
    """Raise UserError if rows of `length` tokens are too short for some questions. key, limit: the
    config's keys of the examples and of the length, for the sentence."""
    for each in questions:
        if each.longest > length:
            problem = f"{each.shots} examples of {each.task} and a question need {each.longest} "
            todo = f"give fewer examples, or {limit} of at least {each.longest}"
            raise UserError(key, f"{problem}tokens, and {limit} is {length}", todo)


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


def passes_of(questions: Sequence[Questions], rows: int = ROWS, multiple: int = 1) -> Passes:
    """Return the passes of `rows` rows that answer the questions; multiple: the width of a pass is
    a multiple of it."""
    longest, total = max(q.longest for q in questions), sum(len(q.rows) for q in questions)
    return Passes(-(-total // rows), rows, -(-longest // multiple) * multiple)


class Column(NamedTuple):
    """The column of an accuracy. shots: solved examples before a question; kind: one of KINDS."""

    task: str
    shots: int
    kind: str = _SHARE

    @property
    def name(self) -> str:
        """Its name in rows and records, such as `ability/copy/4_nats`."""
        end = "" if self.kind == _SHARE else f"_{self.kind}"
        return f"ability/{self.task}/{self.shots}{end}"


def column_of(name: str) -> Column | None:
    """Return the column that has this name; None for the name of something else."""
    if (match := _COLUMN.fullmatch(name)) is None:
        return None
    task, shots, kind = match.groups(_SHARE)
    return Column(task, int(shots), kind)


@dataclass(frozen=True)
class Accuracy:
    """The accuracy on a task. right: of `questions`; nats: the mean loss of an answer, summed over
    its tokens, which moves long before the accuracy does, and its standard error. None in place of
    this: the examples don't fit the model's context."""

    task: str
    shots: int
    right: int
    questions: int
    nats: float
    nats_stderr: float = math.nan

    @property
    def share(self) -> float:
        return self.right / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """The 90 % interval of the share."""
        return interval_of(self.right, self.questions)

    @property
    def stderr(self) -> float:
        """The standard error of the share: half its interval before it is cut to [0, 1], over the
        normal quantile. Unlike the plain one it isn't 0 where none or all of the answers are
        right."""
        return _middle_and_half(self.right, self.questions)[1] / _Z

    @property
    def columns(self) -> dict[str, float]:
        """The numbers by their names in rows and records."""
        return {Column(self.task, self.shots, kind).name: getattr(self, kind) for kind in KINDS}


def interval_of(right: int, questions: int) -> tuple[float, float]:
    """Return the 90 % interval of the share right / questions (Wilson 1927)."""
    middle, half = _middle_and_half(right, questions)
    return max(0.0, middle - half), min(1.0, middle + half)


def _middle_and_half(right: int, questions: int) -> tuple[float, float]:
    n, p = questions, right / questions
    middle = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    return middle, _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))


def in_words(row: Mapping[str, Any]) -> str:
    """Return the shares of right answers that a row has, in a line; empty if it has none."""
    columns = ((column_of(name), value) for name, value in row.items())
    shares = {(c.task, c.shots): x for c, x in columns if c is not None and c.kind == _SHARE}
    every = [*dict.fromkeys(shots for _, shots in shares)]
    percents = {at: f"{100 * share:.0f} %" for at, share in shares.items()}
    tasks = (  # -: not measured, the examples do not fit
        f"{task} {', '.join(percents.get((task, shots), '-') for shots in every)}"
        for task in dict.fromkeys(task for task, _ in shares)
    )
    after = ", ".join(map(str, every))
    return f"right answers after {after} examples: {'; '.join(tasks)}" if shares else ""
