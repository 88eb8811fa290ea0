"""Causal tracing: which states carry a fact from its subject to its answer (Meng et al. 2022, arXiv
2202.05262, section 2.1).

    clean      p of the answer after the text
    corrupted  p after noise is added to the embeddings of the subject's tokens
    restored   p after that noise where one state is put back to its clean value

Invariant: the noise of a draw is the same for all states, so that restored values compare. Its
standard deviation is 3 times that of the embeddings of the text, as in the paper.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forescale.console import Progress, silent
from forescale.inspection.edits import Edit, edited, in_parts
from forescale.models.transformer import Transformer

PLACES = ("stream", "mixer", "mlp")
_NOISE = 3.0
DRAWS = 8


@dataclass(frozen=True)
class Trace:
    """clean, corrupted: probability of the answer's first token; restored: for each place of PLACES
    (layers, L), the mean over the draws; of the stream, behind block i. first, end: the subject's
    tokens."""

    answer: int
    first: int
    end: int
    clean: float
    corrupted: float
    restored: dict[str, list[list[float]]]


@torch.no_grad()
def trace(
    model: Transformer,
    tokens_L: Tensor,
    first: int,
    end: int,
    answer: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Trace:
    """Return the trace of a text whose tokens [first, end) are the subject.

    answer: the token that should follow the text; None: the model's most likely one.
    """
    length, layers = len(tokens_L), len(model.blocks)
    clean: dict[str, dict[int, Tensor]] = {place: {} for place in PLACES}

    def keep(place: str) -> Edit:
        def edit(layer: int, values: Tensor) -> Tensor:
            clean[place][layer] = values[0]
            return values

        return edit

    with edited(model, **{place: keep(place) for place in PLACES}):
        after_V = model(tokens_L[None])[0, -1].float().softmax(-1)
    answer = int(after_V.argmax()) if answer is None else answer
    embedded_LD = clean["stream"][0]
    generator = torch.Generator().manual_seed(seed)
    shape = (DRAWS, end - first, embedded_LD.shape[1])
    noise = _NOISE * float(embedded_LD.std()) * torch.randn(shape, generator=generator)
    noise = noise.to(embedded_LD)

    def chances(place: str | None, layer: int, columns: Tensor) -> Tensor:
        """Return p of the answer, (n, DRAWS), where row i has the clean state of columns[i]."""
        count = len(columns)
        rows, column = torch.arange(count * DRAWS), columns.repeat_interleave(DRAWS)

        def corrupt(at: int, values: Tensor) -> Tensor:
            if at == 0:
                values = values.clone()
                values[:, first:end] += noise.repeat(count, 1, 1)
            return values

        def restore(at: int, values: Tensor) -> Tensor:
            if at != layer + (place == "stream"):
                return values
            values = values.clone()
            values[rows, column] = clean[place or ""][at][column]
            return values

        def of_stream(at: int, values: Tensor) -> Tensor:
            return restore(at, corrupt(at, values))

        edits: dict[str, Edit] = {"stream": corrupt}
        if place is not None:
            edits[place] = of_stream if place == "stream" else restore
        with edited(model, **edits):
            logits = model(tokens_L.expand(count * DRAWS, -1))[:, -1]
        return logits.float().softmax(-1)[:, answer].view(count, DRAWS)

    corrupted = float(chances(None, 0, torch.zeros(1, dtype=torch.long)).mean())
    restored: dict[str, list[list[float]]] = {place: [] for place in PLACES}
    done, total = 0, len(PLACES) * layers * length
    for place in PLACES:
        for layer in range(layers):
            row: list[float] = []
            for part in in_parts(length, length * DRAWS):
                row += chances(place, layer, torch.arange(part.start, part.stop)).mean(1).tolist()
                done += part.stop - part.start
                progress("trace", done, total, "states")
            restored[place].append(row)
    return Trace(answer, first, end, float(after_V[answer]), corrupted, restored)
