"""What a model's output becomes when a part of it is taken away or put back.

Ablation (Michel, Levy and Neubig 2019, arXiv 1905.10650): the mean loss of a text without a head, a
mixer or an MLP minus that with it, in nats a token. The part then adds 0 to the residual stream,
and nothing else changes.

Causal tracing (Meng et al. 2022, arXiv 2202.05262, section 2.1): which states carry a fact from its
subject to its answer.

    clean      p of the answer after the text
    corrupted  p after noise is added to the embeddings of the subject's tokens
    restored   p after that noise where one state is put back to its clean value

Invariant: the noise of a draw is the same for all states, so that restored values compare. Its
standard deviation is 3 times that of the embeddings of the text, as in the paper.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forescale.ground.console import Progress, silent
from forescale.inspection.blocks import Decoder, blocks_of
from forescale.inspection.edits import Edit, edited, in_parts, token_losses

PLACES = ("stream", "mixer", "mlp")
_NOISE = 3.0
DRAWS = 8


@dataclass(frozen=True)
class Ablation:
    """heads: for each layer those of its heads, [] for a mixer without heads; mixers, mlps: one a
    layer, None where a class of transformers has no such part that is added to the stream."""

    heads: list[list[float]]
    mixers: list[float | None]
    mlps: list[float | None]


@torch.no_grad()
def ablate(model: Decoder, tokens_L: Tensor, progress: Progress = silent) -> Ablation:
    """Return the changes of the loss. tokens (L,): what the model reads; the first has no loss."""
    whole = float(token_losses(model(tokens_L[None]), tokens_L[None]).mean())
    blocks, done = blocks_of(model), 0
    layers = len(blocks)
    counts = [block.num_heads for block in blocks]
    total = 2 * layers + sum(counts)

    def changes(count: int, **edits) -> list[float]:
        """Return the changes where row r of a batch has its own edit, edits[...](r)."""
        nonlocal done
        differences: list[float] = []
        for part in in_parts(count, len(tokens_L)):
            rows_BL = tokens_L.expand(part.stop - part.start, -1)
            row_edits = {place: edit(part) for place, edit in edits.items()}
            with edited(model, **row_edits):
                losses_B = token_losses(model(rows_BL), rows_BL).mean(1)
            differences += (losses_B - whole).tolist()
            done += part.stop - part.start
            progress("ablate", done, total, "parts")
        return differences

    def without_layer(part: slice):
        def edit(layer: int, values: Tensor) -> Tensor:
            if not part.start <= layer < part.stop:
                return values
            values = values.clone()
            values[layer - part.start] = 0
            return values

        return edit

    def without_head_of(chosen: int):
        def rows(part: slice):
            def edit(layer: int, values_BLHK: Tensor) -> Tensor:
                if layer != chosen:
                    return values_BLHK
                values_BLHK = values_BLHK.clone()
                rows = torch.arange(part.stop - part.start)
                values_BLHK[rows, :, rows + part.start] = 0
                return values_BLHK

            return edit

        return rows

    mixers, mlps = changes(layers, mixer=without_layer), changes(layers, mlp=without_layer)
    return Ablation(
        heads=[
            changes(count, heads=without_head_of(i)) if count else []
            for i, count in enumerate(counts)
        ],
        mixers=[x if block.adds else None for x, block in zip(mixers, blocks, strict=True)],
        mlps=[x if b.adds and b.mlp else None for x, b in zip(mlps, blocks, strict=True)],
    )


@dataclass(frozen=True)
class Trace:
    """clean, corrupted: probability of the answer's first token; restored: for each place (layers,
    L), the mean over the draws; of the stream, behind block i; the others are of PLACES, those that
    all blocks have. first, end: the subject's tokens."""

    answer: int
    first: int
    end: int
    clean: float
    corrupted: float
    restored: dict[str, list[list[float]]]


@torch.no_grad()
def trace(
    model: Decoder,
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
    blocks = blocks_of(model)
    length, layers = len(tokens_L), len(blocks)
    count = (2 + all(b.mlp is not None for b in blocks)) if all(b.adds for b in blocks) else 1
    places = PLACES[:count]
    clean: dict[str, dict[int, Tensor]] = {place: {} for place in places}

    def keep(place: str) -> Edit:
        def edit(layer: int, values: Tensor) -> Tensor:
            clean[place][layer] = values[0]
            return values

        return edit

    with edited(model, **{place: keep(place) for place in places}):
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
    restored: dict[str, list[list[float]]] = {place: [] for place in places}
    done, total = 0, len(places) * layers * length
    for place in places:
        for layer in range(layers):
            row: list[float] = []
            for part in in_parts(length, length * DRAWS):
                row += chances(place, layer, torch.arange(part.start, part.stop)).mean(1).tolist()
                done += part.stop - part.start
                progress("trace", done, total, "states")
            restored[place].append(row)
    return Trace(answer, first, end, float(after_V[answer]), corrupted, restored)
