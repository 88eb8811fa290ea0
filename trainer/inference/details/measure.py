"""The details of a score: one more pass over its windows."""

from dataclasses import dataclass

from torch import nn

from forescale.config.train import TrainJob
from forescale.console import Progress, silent
from forescale.data.dataset import Dataset
from forescale.errors import UserError
from forescale.inference.details.in_context import InContext, InContextSums
from forescale.inference.details.origins import DocumentSums, Part
from forescale.inference.details.tokens import window_losses


@dataclass(frozen=True)
class Details:
    """What `measure` returns. parts: bits per byte by `kind` and by `source`, see DocumentSums."""

    parts: dict[str, list[Part]]
    in_context: InContext


def expect_continuing(config: TrainJob) -> None:
    """Raise UserError for a run without these details: they are of each next token of a text."""
    if not config.continues_text or not config.objective.is_next_token:
        kind = config.objective.kind
        problem = f"are of each next token of a text, and the run has objective={kind}"
        raise UserError("details", problem, "leave it out, or name a run that continues text")


def measure(
    config: TrainJob,
    model: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    sequence_length: int,
    windows: int | None = None,
    progress: Progress = silent,
) -> Details:
    """Return the details of the score of a model on a split, in windows of so many targets.

    config: of the run; windows: as of `score`.
    """
    context, sums = InContextSums(sequence_length), DocumentSums(dataset, split)
    for found in window_losses(
        model,
        dataset.split(split),
        sequence_length,
        windows=windows,
        documents=config.data.document_mask,
        progress=progress,
    ):
        context.add(found)
        sums.add(found)
    return Details(sums.parts(), context.score())
