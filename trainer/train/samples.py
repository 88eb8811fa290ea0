"""Texts that a model in training writes at each evaluation: what its loss sounds like.

Invariant: it changes nothing of the training (no data is read, no random state is used, no graph is
compiled), and all evaluations draw the same random numbers: another text comes from other weights.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from forescale.models.decoding.sampler import Sampler
from forescale.train.abilities import logits_beside

if TYPE_CHECKING:
    from forescale.engine.step import Engine

_SAMPLER = Sampler(temperature=0.8, top_k=50)  # as `generate` has them
_SEED = 1337


class Samples:
    """Writes a text to each prompt when called, and returns the texts without the prompts. Every
    rank calls it together: each token is a forward pass of all prompts over a row of the same
    width, which all ranks make.

    rows: the tokens of the prompts; decode: ids to text, with that of special tokens; end: the id
    that ends a text.
    """

    def __init__(
        self,
        rows: Sequence[list[int]],
        count: int,
        decode: Callable[[list[int]], str],
        end: int,
        engine: "Engine",
        mark: Callable[[str], None],
    ):
        self._rows, self._count, self._decode, self._end = rows, count, decode, end
        self._engine, self._mark = engine, mark
        pieces = engine.world.mesh.pieces
        self._width = -(-(max(map(len, rows)) + count) // pieces) * pieces
        random = torch.Generator().manual_seed(_SEED)
        self._draws = torch.rand(count, len(rows), 1, dtype=torch.float64, generator=random)

    def __call__(self) -> list[str]:
        tokens_BL = torch.zeros(len(self._rows), self._width, dtype=torch.int64)
        ends = torch.tensor([len(row) for row in self._rows])
        for i, row in enumerate(self._rows):
            tokens_BL[i, : len(row)] = torch.tensor(row)
        rows: list[list[int]] = [[] for _ in self._rows]
        for step in range(self._count):
            chosen = self._next(tokens_BL, ends + step - 1, self._draws[step])
            tokens_BL[torch.arange(len(ends)), ends + step] = torch.tensor(chosen)
            for row, token in zip(rows, chosen, strict=True):
                if row[-1:] != [self._end]:
                    row.append(token)
            if all(row[-1] == self._end for row in rows):
                break
        texts = ([t for t in row if t != self._end] for row in rows)
        return [self._text(prompt, text) for prompt, text in zip(self._rows, texts, strict=True)]

    def _text(self, prompt: list[int], text: list[int]) -> str:
        """Return what is written as it stands behind its prompt: alone, the first token of some
        tokenizers loses the space before it."""
        before, whole = self._decode(prompt), self._decode([*prompt, *text])
        return whole.removeprefix(before) if whole.startswith(before) else self._decode(text)

    def _next(self, tokens_BL: Tensor, at_B: Tensor, drawn_B1: Tensor) -> list[int]:
        """Return the token after column `at` of each row: rank 0 chooses, of equal logits too."""
        self._mark("evaluation")
        world = self._engine.world
        is_last_BL = torch.zeros_like(tokens_BL).index_put(
            (torch.arange(len(at_B)), at_B), torch.tensor(1)
        )
        parts = self._engine, tokens_BL, is_last_BL, "validation.prompts"
        logits_BLV, is_last_BC = logits_beside(*parts)
        row_K, column_K = is_last_BC.nonzero(as_tuple=True)
        logits_BV = logits_BLV.new_zeros((len(at_B), logits_BLV.shape[-1]), dtype=torch.float32)
        logits_BV[row_K] = logits_BLV[row_K, column_K].float()
        logits_BV = world.columns.sum(logits_BV).cpu()
        chosen: list[int] = world.from_main(
            lambda: _SAMPLER.choose(logits_BV, drawn_B1)[:, 0].tolist()
        )
        return chosen
