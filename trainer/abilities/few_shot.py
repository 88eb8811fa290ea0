"""The accuracy of a model on a task, after so many solved examples in its context.

Invariant: an answer counts if each of its tokens, the line end included, is the most likely one
after the tokens before it: exactly when greedy decoding would write it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from forescale.abilities.columns import KINDS, Column
from forescale.abilities.questions import Questions, passes_of
from forescale.console import Progress, silent

# tokens (B, L) and targets (B, L) int64, IGNORED but at answers -> what `judged` returns
Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Gather = Callable[[list], list[list]]  # a rank's values -> those of all ranks, in their order
IGNORED = -100  # a target that is none, as in the losses of models
_Z = NormalDist().inv_cdf(0.95)


@dataclass(frozen=True)
class Accuracy:
    """right: of `questions`; low, high: the 90 % interval of the share (Wilson 1927); nats: the
    mean loss of an answer, summed over its tokens, which moves long before the accuracy does, and
    its standard error. None in place of this: the examples don't fit the model's context."""

    task: str
    shots: int
    right: int
    questions: int
    nats: float
    nats_stderr: float = math.nan

    @property
    def share(self) -> float:
        """The share of right answers."""
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
        return _spread_of(self.right, self.questions)[1] / _Z

    @property
    def columns(self) -> dict[str, float]:
        """What rows and records call these numbers: `ability/copy/4` is the share, `_stderr` its
        standard error; `_nats` the mean loss of an answer, `_nats_stderr` its standard error."""
        return {Column(self.task, self.shots, kind).name: getattr(self, kind) for kind in KINDS}


def interval_of(right: int, questions: int) -> tuple[float, float]:
    """Return the 90 % interval of the share right / questions (Wilson 1927)."""
    middle, half = _spread_of(right, questions)
    return max(0.0, middle - half), min(1.0, middle + half)


def _spread_of(right: int, questions: int) -> tuple[float, float]:
    """Return the middle of that interval, and half its length."""
    n, p = questions, right / questions
    middle = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    return middle, _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))


@torch.no_grad()
def accuracies(
    judge: Judge,
    found: Sequence[Questions],
    *,
    rows: int = 8,
    multiple: int = 1,
    share: tuple[int, int] = (0, 1),
    gather: Gather = lambda own: [own],
    progress: Progress = silent,
) -> list[Accuracy]:
    """Return the accuracies of a model on questions.

    rows: of a forward pass; multiple: what its columns are a multiple of; share: (rank, number of
    ranks) that answer together, for `gather`. All passes have the same shape and composition at any
    number of ranks, and every rank makes as many, because they may be collectives.
    """
    all_rows = [row for each in found for row in each.rows]
    passes, (rank, size) = passes_of(found, rows, multiple), share
    count, width = passes.count, passes.width
    mine: list[tuple[int, int, float]] = []
    for index in range(rank, passes.of_each(size) * size, size):
        # Beyond the last questions a rank answers the first ones, which nobody counts.
        first = index * rows if index < count else 0
        wrong_B, nats_B = judge(*_padded(all_rows[first : first + rows], rows, width))
        if index < count:
            got = zip(wrong_B.tolist(), nats_B.tolist(), strict=True)
            mine += [(first + i, int(w), x) for i, (w, x) in enumerate(got)]
        progress("abilities", min((index + 1) * rows, len(all_rows)), len(all_rows), "questions")
    judged_rows = sorted(tuple(row) for part in gather(mine) for row in part)
    answers = iter(judged_rows)  # padding has the highest numbers
    return [_accuracy(each, [next(answers) for _ in each.rows]) for each in found]


def _accuracy(of: Questions, answers: list[tuple[int, int, float]]) -> Accuracy:
    right = sum(not wrong for _, wrong, _ in answers)
    nats, n = [x for _, _, x in answers], len(answers)
    mean = math.fsum(nats) / n
    square = math.fsum((x - mean) ** 2 for x in nats)
    stderr = math.sqrt(square / (n - 1) / n) if n > 1 else math.nan
    return Accuracy(of.task, of.shots, right, n, mean, stderr)


def _padded(made: Sequence[tuple[list[int], int]], rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, (rows, width) int64: the target of a column is the next token."""
    tokens = torch.zeros(rows, width, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    # Padding behind a row changes nothing before it: the model is causal.
    for row, (ids, count) in enumerate(made):
        known = torch.tensor(ids)
        tokens[row, : len(ids)] = known
        targets[row, len(ids) - count - 1 : len(ids) - 1] = known[len(ids) - count :]
    return tokens, targets


def judged(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each row how many targets are not the most likely token, and the nats of all its
    targets, (B,) fp64 each, on the CPU."""
    targets_BL = targets_BL.to(logits_BLV.device)
    is_target_BL = targets_BL != IGNORED
    target_K = targets_BL[is_target_BL]
    known_KV = logits_BLV[is_target_BL].float().log_softmax(-1)
    wrong_K = known_KV.argmax(-1) != target_K
    nats_K = -known_KV.gather(-1, target_K[:, None])[:, 0]
    row_K = is_target_BL.nonzero()[:, 0].cpu()
    empty_B = torch.zeros(len(targets_BL), dtype=torch.float64)
    wrong_B = empty_B.index_add(0, row_K, wrong_K.double().cpu())
    return wrong_B, empty_B.index_add(0, row_K, nats_K.double().cpu())
