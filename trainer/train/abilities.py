"""Answers questions with a model: its accuracy on small tasks after so many solved examples.

Invariant: an answer counts if each of its tokens, the line end included, is the most likely one
after the tokens before it: exactly when greedy decoding would write it.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from forescale.engine.ranks import ALONE, Ranks, joined
from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.run.abilities import ROWS, Accuracy, Questions, passes_of

if TYPE_CHECKING:
    from forescale.engine.step import Engine

# tokens (B, L) and targets (B, L) int64, IGNORED but at answers -> what `judged` returns
Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
IGNORED = -100  # not a target, as in the losses of models


@torch.no_grad()
def accuracies(
    judge: Judge,
    questions: Sequence[Questions],
    *,
    rows: int = ROWS,
    multiple: int = 1,
    ranks: Ranks = ALONE,
    progress: Progress = silent,
) -> list[Accuracy]:
    """Return the accuracies of a model on questions.

    rows: of a forward pass; multiple: the width of a pass is a multiple of it; ranks: that answer
    together. All passes have the same shape and composition at any number of ranks, and every rank
    makes as many, because they may be collectives.
    """
    all_rows = [row for each in questions for row in each.rows]
    passes, rank, size = passes_of(questions, rows, multiple), ranks.rank, ranks.size
    count, width = passes.count, passes.width
    answers: list[tuple[int, int, float]] = []
    for index in range(rank, passes.of_each(size) * size, size):
        # Beyond the last questions a rank answers the first ones, which nobody counts.
        first = index * rows if index < count else 0
        wrong_B, nats_B = judge(*_padded(all_rows[first : first + rows], rows, width))
        if index < count:
            pairs = zip(wrong_B.tolist(), nats_B.tolist(), strict=True)
            answers += [(first + i, int(w), x) for i, (w, x) in enumerate(pairs)]
        progress("abilities", min((index + 1) * rows, len(all_rows)), len(all_rows), "questions")

    def results(parts: list[list[Any]]) -> list[dict[str, Any]]:
        return [vars(each) for each in _accuracies_of(questions, sorted(joined(parts)))]

    return [Accuracy(**each) for each in ranks.reduce_on_main(answers, results)]


def _accuracies_of(
    questions: Sequence[Questions], answers: Sequence[tuple[int, int, float]]
) -> list[Accuracy]:
    """Return the accuracies by all answers, in their order: the number of each, its wrong tokens,
    its nats. Padding has the highest numbers."""
    in_order, results = iter(answers), []
    for each in questions:
        _, wrong, nats = zip(*[next(in_order) for _ in each.rows], strict=True)
        n, mean = len(nats), math.fsum(nats) / len(nats)
        square = math.fsum((x - mean) ** 2 for x in nats)
        stderr = math.sqrt(square / (n - 1) / n) if n > 1 else math.nan
        results.append(Accuracy(each.task, each.shots, wrong.count(0), n, mean, stderr))
    return results


def _padded(
    questions: Sequence[tuple[list[int], int]], rows: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, (rows, width) int64: the target of a column is the next token."""
    tokens = torch.zeros(rows, width, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    # Padding behind a row changes nothing before it: the model is causal.
    for row, (ids, count) in enumerate(questions):
        row_tokens = torch.tensor(ids)
        tokens[row, : len(ids)] = row_tokens
        targets[row, len(ids) - count - 1 : len(ids) - 1] = row_tokens[len(ids) - count :]
    return tokens, targets


def judged(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each row how many targets are not the most likely token, and the nats of all its
    targets, (B,) fp64 each, on the CPU."""
    targets_BL = targets_BL.to(logits_BLV.device)
    is_target_BL = targets_BL != IGNORED
    target_K = targets_BL[is_target_BL]
    log_probs_KV = logits_BLV[is_target_BL].float().log_softmax(-1)
    wrong_K = log_probs_KV.argmax(-1) != target_K
    nats_K = -log_probs_KV.gather(-1, target_K[:, None])[:, 0]
    row_K = is_target_BL.nonzero()[:, 0].cpu()
    empty_B = torch.zeros(len(targets_BL), dtype=torch.float64)
    wrong_B = empty_B.index_add(0, row_K, wrong_K.double().cpu())
    return wrong_B, empty_B.index_add(0, row_K, nats_K.double().cpu())


def logits_beside(
    engine: "Engine", tokens_BL: Tensor, beside_BL: Tensor, key: str
) -> tuple[Tensor, Tensor]:
    """Return the logits of rows, and the numbers that stand beside their tokens: where ranks divide
    rows, those of this rank's columns. All ranks call it together. Raises UserError, which names
    the config's `key`, if a class of the user's own returns no logits."""
    logits_BLV = engine.logits(tokens_BL)
    if engine.world.columns.size > 1:
        model: Any = engine.module
        beside_BL = model.group.columns(beside_BL)
    if not isinstance(logits_BLV, Tensor) or logits_BLV.shape[:-1] != beside_BL.shape:
        problem = f"without targets it returns no logits of {len(beside_BL)} rows"
        todo = f"return logits (B, L, V), or leave out {key}"
        raise UserError("the model's forward()", problem, todo)
    return logits_BLV, beside_BL


class Abilities:
    """Measures abilities when called: the columns that a row of metrics gets. Every rank calls it
    together; ranks share the questions as they share windows. It changes nothing of the training:
    no data is read, no random state is used, no graph is compiled.

    mark: receives the place of this rank, as in evaluate. Raises UserError if a class of the user's
    own returns no logits.
    """

    def __init__(
        self, questions: Sequence[Questions], engine: "Engine", mark: Callable[[str], None]
    ):
        self._questions, self._engine, self._mark = questions, engine, mark

    def __call__(self) -> dict[str, float]:
        world = self._engine.world
        results = accuracies(
            self._judge,
            self._questions,
            multiple=world.mesh.pieces,
            ranks=world.data,
        )
        return {name: value for result in results for name, value in result.columns.items()}

    def _judge(self, tokens_BL: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
        self._mark("evaluation")
        group, key = self._engine.world.columns, "validation.abilities"
        logits_BLV, targets_BC = logits_beside(self._engine, tokens_BL, targets_BL, key)
        wrong_B, nats_B = judged(logits_BLV, targets_BC)
        if group.size > 1:
            both = torch.stack([wrong_B, nats_B]).to(self._engine.world.device)
            wrong_B, nats_B = group.sum(both).cpu()
        return wrong_B, nats_B
