"""A trained model at sequences longer than it was trained on, and its loss by position.

Invariant: weights are those of the checkpoint; only rotary frequencies change, and only if asked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.console import Progress, silent
from forescale.data.bins import num_windows
from forescale.data.dataset import Dataset
from forescale.data.objective import IGNORED, NEXT_TOKEN, Objective
from forescale.data.stream import MicroBatch, validation_windows
from forescale.errors import UserError
from forescale.models.positions.position import document_starts, positions_of
from forescale.models.transformer import Transformer
from forescale.train.evaluate import ratio_stderr


@dataclass(frozen=True)
class Bucket:
    """The loss at positions first to last, in nats a target.

    A position is the number of tokens that the model sees besides the last one. loss_stderr:
    standard error, windows taken as independent. An empty bucket has NaN.
    """

    first: int
    last: int
    loss: float
    loss_stderr: float
    targets: int


def at_length(model: nn.Module, length: int, trained: int, scaling: str | None) -> nn.Module:
    """Return the model for sequences of `length` tokens; the same object if nothing changes.

    Args: `trained`, the sequence length of its training; `scaling`, ntk or yarn, of rotary
    positions by length / trained; None: as trained. Raises UserError if the model has no positions
    beyond its table, or can't be scaled.
    """
    if not isinstance(model, Transformer):
        if scaling:
            problem = "only positions of forescale's own model can be scaled"
            raise UserError("rope_scaling", problem, "leave it out")
        return model
    config, longest = model.config, model.sizes.max_sequence_length
    if config.position == "learned" and length > longest:
        problem = f"the model has {longest} learned positions, and none beyond"
        raise UserError("sequence_length", problem, f"give at most {longest}")
    if scaling is None:
        return model
    if config.position != "rotary" or config.rope_scaling != "none":
        has = config.position if config.position != "rotary" else config.rope_scaling
        problem = f"the model was trained with {has}, and not with plain rotary positions"
        raise UserError("rope_scaling", problem, "leave it out")
    if length <= trained:
        problem = f"there is nothing to scale: the model was trained at {trained} tokens"
        raise UserError("rope_scaling", problem, f"give sequence_length above {trained}")
    original = trained if scaling == "yarn" else None
    scaled = replace(
        config,
        rope_scaling=scaling,
        rope_factor=length / trained,
        rope_original_length=original,
    )
    with torch.device("meta"):
        found = Transformer(scaled)
    found.load_state_dict(model.state_dict(), assign=True)
    return found.train(model.training)


def edges_of(length: int, trained: int) -> list[int]:
    """Return where buckets begin, and `length`: the quarter and half of `trained`, then doubled."""
    found = [0, trained // 4, trained // 2, trained]
    while found[-1] < length:
        found.append(2 * found[-1])
    return [*sorted({edge for edge in found if edge < length}), length]


@torch.no_grad()
def loss_by_position(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    sequence_length: int,
    edges: Sequence[int],
    windows: int | None = None,
    documents: bool = False,
    objective: Objective = NEXT_TOKEN,
    progress: Progress = silent,
) -> list[Bucket]:
    """Return the loss in each bucket of positions, over the windows that `score` takes.

    Args: `edges`, increasing: a bucket holds the positions from one edge to before the next;
    `documents`, as trained: then positions count from the document's first token in the window.
    Logits of one window are held at a time, (L, V) fp32.
    """
    part = dataset.split(split)
    device = next(model.parameters()).device
    count = num_windows(part, sequence_length)
    total, limits, rows = min(count, windows or count), torch.tensor(edges), []
    parts = validation_windows(
        part, sequence_length, 1, limit=windows, documents=documents, objective=objective
    )
    for done, window in enumerate(parts, 1):
        rows.append(_sums(model, window, limits, device))
        progress("loss by position", done, total, "windows")
    nats, targets = (np.array(rows)[:, i].T for i in (0, 1))  # (buckets, windows) each
    return [
        _bucket(first, last - 1, *of_bucket)
        for first, last, *of_bucket in zip(edges[:-1], edges[1:], nats, targets, strict=True)
    ]


def _sums(
    model: nn.Module, window: MicroBatch, limits: Tensor, device: torch.device
) -> tuple[list[float], list[int]]:
    """Return the nats and the targets of one window in each bucket."""
    (tokens_1L, targets_1L), named = window.arguments(device)
    logits_LV = model(tokens_1L, **named)[0].float()
    nats_L = F.cross_entropy(logits_LV, targets_1L[0], ignore_index=IGNORED, reduction="none")
    starts_1L = None if window.documents is None else document_starts(window.documents)
    length, where = window.tokens.shape[1], window.tokens.device
    positions_L = positions_of(length, where, None, starts_1L).view(-1)
    bucket_L = torch.bucketize(positions_L, limits[1:-1], right=True)
    real_L = window.targets[0] != IGNORED
    size = len(limits) - 1
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, bucket_L, nats_L.double().cpu())
    return sums.tolist(), bucket_L[real_L].bincount(minlength=size).tolist()


def _bucket(first: int, last: int, nats: np.ndarray, targets: np.ndarray) -> Bucket:
    if not targets.sum():
        return Bucket(first, last, math.nan, math.nan, 0)
    used = targets > 0
    loss = math.fsum(nats) / int(targets.sum())
    stderr = ratio_stderr(nats[used], targets[used], loss)
    return Bucket(first, last, loss, stderr, int(targets.sum()))
