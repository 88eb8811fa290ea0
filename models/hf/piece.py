"""A piece: where a part of one of our parameters lies in the tensors of a Hugging Face model.

Import and export both read it. Invariant: the pieces of a model have every element of every
parameter once, in the order of the parameters, and each piece is in one tensor, so that no model is
ever held whole.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A contiguous part of our parameter `name`: `shape`, from element `start` on.

    In the Hugging Face tensor `source`, transposed if `is_turned`, it is `part` (i, n): the i-th of
    n equal parts of the rows, or of those of each of `heads`. The import multiplies each number by
    `times`, and adds `added` to it, and the first row of the tensor `row`, if that is named.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    source: str
    part: tuple[int, int] = (0, 1)
    is_turned: bool = False
    added: float = 0.0
    heads: int = 1
    times: float = 1.0
    row: str = ""

    def taken(self, source: Tensor, row: Tensor | None = None) -> Tensor:
        """Return the piece of `source`, contiguous, in its number format, or in fp32 if numbers
        change. row: the tensor of that name. Raises ValueError if one does not have the shape that
        config.json implies."""
        index, count = self.part
        expected = (count * self.shape[0], *self.shape[1:])
        self._expect(self.source, source, expected[::-1] if self.is_turned else expected)
        part = source.T if self.is_turned else source
        if self.heads > 1:
            part = part.unflatten(0, (self.heads, count, -1))[:, index].flatten(0, 1)
        else:
            part = part.narrow(0, index * self.shape[0], self.shape[0])
        if row is not None:
            self._expect(self.row, row, (len(row), *self.shape[1:]))
            part = part.float() + row[0].float()
        if self.added or self.times != 1:
            part = part.float() * self.times + self.added
        return part.contiguous()

    def _expect(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            problem = f"the weight {name} is {list(tensor.shape)}"
            raise ValueError(f"{problem}, and {list(shape)} by config.json.")


def exported(
    pieces: Iterable[Piece], state: Mapping[str, Tensor], factors: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors by name, made of the parameters times their factors. Each
    parameter is read from `state` when it is needed, and not held."""
    sources: dict[str, list[Piece]] = {}
    for piece in pieces:
        sources.setdefault(piece.source, []).append(piece)
    name, whole = "", torch.empty(0)  # the last parameter: successive experts share one
    for source, parts in sources.items():
        tensors: list[Tensor] = []
        for piece in parts:
            if piece.name != name:
                name, whole = piece.name, state[piece.name]
                whole = whole * factors[name] if name in factors else whole
            tensor = whole
            if whole.shape != piece.shape:
                tensor = whole[piece.start // math.prod(piece.shape)].clone()  # files hold no views
            tensors.append(tensor - piece.added if piece.added else tensor)
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if (heads := parts[0].heads) > 1:
            tensor = tensor.unflatten(0, (len(tensors), heads, -1)).transpose(0, 1).flatten(0, 2)
        yield source, tensor.T.contiguous() if parts[0].is_turned else tensor


def joined(parts: list[Tensor]) -> Tensor:
    """Return a parameter from all its pieces. Several pieces are the matrices of a stack."""
    return torch.stack(parts) if len(parts) > 1 else parts[0]


def matched(kind: str, pieces: list[Piece], there: Mapping[str, str]) -> list[Piece]:
    """Return the pieces with the names of the files. there: the usual name of a tensor -> its name.
    Raises ValueError for an unknown or missing one. kind: of the model, in a word."""
    sources = dict.fromkeys(name for piece in pieces for name in (piece.source, piece.row) if name)
    if missing := [name for name in sources if name not in there]:
        raise ValueError(f"the weight {missing[0]} is missing{_others(missing)}.")
    if unknown := [name for name in there if name not in sources]:
        raise ValueError(f"unexpected weight {unknown[0]} in a {kind} model{_others(unknown)}.")
    names = {**there, "": ""}
    return [replace(p, source=names[p.source], row=names[p.row]) for p in pieces]


def _others(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
