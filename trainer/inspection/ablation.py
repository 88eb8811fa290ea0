"""What a text's loss becomes without a head, a mixer or an MLP.

Invariant: what is taken away adds 0 to the residual stream, and nothing else changes (Michel, Levy
and Neubig 2019, arXiv 1905.10650). Each number is the mean loss of the text without the part, minus
that with it, in nats a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forescale.console import Progress, silent
from forescale.inspection.edits import blocks_of, edited, has_heads, in_parts, token_losses
from forescale.models.transformer import Transformer


@dataclass(frozen=True)
class Ablation:
    """heads: for each layer those of its heads, [] for a mixer without heads; mixers, mlps: one a
    layer."""

    heads: list[list[float]]
    mixers: list[float]
    mlps: list[float]


@torch.no_grad()
def ablate(model: Transformer, tokens_L: Tensor, progress: Progress = silent) -> Ablation:
    """Return the changes of the loss. tokens (L,): what the model reads; the first has no loss."""
    whole = float(token_losses(model(tokens_L[None]), tokens_L[None]).mean())
    blocks, done = blocks_of(model), 0
    layers = len(blocks)
    counts = [b.mixer.num_heads if has_heads(b.mixer) else 0 for b in blocks]
    total = 2 * layers + sum(counts)

    def changes(count: int, **edits) -> list[float]:
        """Return the changes where row r of a batch has its own edit, edits[...](r)."""
        nonlocal done
        found: list[float] = []
        for part in in_parts(count, len(tokens_L)):
            rows_BL = tokens_L.expand(part.stop - part.start, -1)
            own = {place: edit(part) for place, edit in edits.items()}
            with edited(model, **own):
                losses_B = token_losses(model(rows_BL), rows_BL).mean(1)
            found += (losses_B - whole).tolist()
            done += part.stop - part.start
            progress("ablate", done, total, "parts")
        return found

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

    return Ablation(
        heads=[
            changes(count, heads=without_head_of(i)) if count else []
            for i, count in enumerate(counts)
        ],
        mixers=changes(layers, mixer=without_layer),
        mlps=changes(layers, mlp=without_layer),
    )
