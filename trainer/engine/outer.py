"""The outer weights of a run on several clusters, their momentum, and the outer step of DiLoCo
(Douillard et al. 2023, arXiv 2311.08105).

    delta     outer weights - the member's master weights, after many steps of its own
    gradient  mean of the members' deltas, added in the order of their names
    momentum <- mu momentum + gradient
    outer    <- outer - rate (gradient + mu momentum)       (Nesterov's, as torch's SGD)
    masters  <- outer

With outer.overlap the deltas are on their way for some steps, and what the member has learned
meanwhile counts (Douillard et al. 2025, Streaming DiLoCo, arXiv 2501.18512):

    masters  <- mixing masters + (1 - mixing) outer

Invariant: each of these is an elementwise operation of fp32 on the host, rounded by itself, so an
element has the same bits wherever its rank, stage and world size put it. Both tensors are laid out
as the masters and are states of the checkpoint, which any other stage and world size can load; so
are deltas on their way.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from forescale.engine.layout import Piece, Unit
from forescale.engine.portable.fragments import WEIGHT, Fragment
from forescale.engine.state import (
    OUTER_DELTA,
    OUTER_MOMENTUM,
    OUTER_WEIGHT,
    Fills,
    fragment_of,
    owned_part,
)
from forescale.engine.step import Engine

_ODD = 0x9E3779B97F4A7C15  # makes a hash depend on the parameter (golden ratio, splitmix64)


def part_of(name: str, count: int) -> int:
    """Return which of `count` parts of the model has a parameter: the number of its block modulo
    count, so that each part has early and late blocks; the first has what is in no block."""
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(number[1]) % count if number else 0


class OuterState:
    """The outer weights of this rank's masters, and their momentum, in host memory.

    deltas: on their way, as weights of a checkpoint: what this rank writes of them. count: of the
    parts that the parameters are divided into. They begin with the masters of this moment, unless a
    checkpoint that has them is loaded later.
    """

    def __init__(self, engine: Engine, count: int = 1):
        self._engine, self._count = engine, count
        self._states: dict[Tensor, dict[str, Tensor]] = {}
        self.deltas: list[Fragment] = []
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Set the outer weights to the masters, and the momentum to 0."""
        self._states, self.deltas = {}, []
        for unit in self._engine.layout.units():
            weight = unit.master.detach().reshape(-1).to("cpu", torch.float32, copy=True)
            self._states[unit.master] = {
                OUTER_WEIGHT: weight,
                OUTER_MOMENTUM: torch.zeros_like(weight),
            }

    def states(self, unit: Unit) -> dict[str, Tensor]:
        """Return the tensors of a unit by the names of their states."""
        return self._states[unit.master]

    def _pieces(self, parts: Sequence[int]) -> Iterator[tuple[Unit, Piece]]:
        names = self._engine.names
        for unit in self._engine.layout.units():
            for piece in unit.pieces:
                if piece.size and part_of(names[piece.param], self._count) in parts:
                    yield unit, piece

    @torch.no_grad()
    def depart(self, parts: Sequence[int]) -> None:
        """Set the deltas of some parts: outer weights minus masters."""
        self.deltas = []
        for unit, piece in self._pieces(parts):
            outer, master = self._views(unit, piece)
            self.deltas += self._owned(piece, outer - master.to("cpu"))

    def under_way(self) -> Iterator[Fragment]:
        """Yield the deltas as a checkpoint holds them."""
        return (replace(part, state=OUTER_DELTA) for part in self.deltas)

    def load(self, reader: Fills) -> None:
        """Set the deltas to those that a checkpoint holds."""
        self.deltas, names = [], self._engine.names
        for _, piece in self._pieces(range(self._count)):
            if OUTER_DELTA in reader.states(names[piece.param]):
                self.deltas += self._owned(piece, torch.empty(piece.size))
        for part in self.under_way():
            reader.fill(part)

    def are_of(self, parts: Sequence[int]) -> bool:
        """True if the deltas are those of some parts."""
        owned = [f for _, p in self._pieces(parts) for f in self._owned(p, torch.empty(p.size))]
        return [f.key for f in owned] == [f.key for f in self.deltas]

    @property
    def are_finite(self) -> bool:
        """True if each number of the deltas is."""
        return all(bool(part.data.isfinite().all()) for part in self.deltas)

    @torch.no_grad()
    def step(
        self, parts: Sequence[int], members: Sequence[Fills], rate: float, momentum: float
    ) -> None:
        """Make the outer step of some parts. members: readers of the deltas that count."""
        for unit, piece in self._pieces(parts) if members else ():
            states, part = self.states(unit), slice(piece.at, piece.at + piece.size)
            gradient, delta = torch.zeros(piece.size), torch.empty(piece.size)
            for member in members:
                member.fill(fragment_of(self._engine, piece.param, WEIGHT, piece.start, delta))
                gradient.add_(delta)
            gradient.div_(len(members))
            velocity = states[OUTER_MOMENTUM][part].mul_(momentum).add_(gradient)
            states[OUTER_WEIGHT][part].sub_(velocity.mul(momentum).add_(gradient).mul_(rate))

    @torch.no_grad()
    def take(self, parts: Sequence[int], mixing: float = 0.0, anew: bool = False) -> None:
        """Set the masters of some parts, and the weights of the forward, to the outer weights, but
        for a share of their own. anew: also set what isn't finite of the moments to 0."""
        layout = self._engine.layout
        layout.before_load()
        for unit, piece in self._pieces(parts):
            outer, master = self._views(unit, piece)
            if mixing:
                outer = outer.mul(1 - mixing).add_(master.to("cpu").mul(mixing))
            master.copy_(outer)
        states = [state for unit in layout.units() for state in self._moments(unit)] if anew else []
        for state in states:
            state.nan_to_num_(0.0, 0.0, 0.0)
        layout.after_load()
        self._engine.weights_changed()

    def _owned(self, piece: Piece, data: Tensor) -> list[Fragment]:
        """Return what this rank writes of `data`, that of a piece: one fragment, or none."""
        engine = self._engine
        whole = fragment_of(engine, piece.param, WEIGHT, piece.start, data)
        return [part] if (part := owned_part(engine, piece, whole)) else []

    def _moments(self, unit: Unit) -> list[Tensor]:
        states = self._engine.layout.base.state.get(unit.master, {}).values()
        return [t for t in states if torch.is_tensor(t) and t.is_floating_point()]

    def _views(self, unit: Unit, piece: Piece) -> tuple[Tensor, Tensor]:
        part = slice(piece.at, piece.at + piece.size)
        return self.states(unit)[OUTER_WEIGHT][part], unit.master.detach().view(-1)[part]

    def hash(self, parts: Sequence[int]) -> int:
        """Return a hash of the bits of the outer weights of some parts that this rank writes: the
        sum of all ranks', modulo 2^64, is the same at any stage and world size."""
        total, order = 0, {name: i for i, name in enumerate(sorted(self._engine.shapes))}
        for unit, piece in self._pieces(parts):
            for part in self._owned(piece, self._views(unit, piece)[0]):
                bits = int(part.data.view(torch.int32).sum(dtype=torch.int64))
                total += bits * (_ODD * (order[part.name] + 1) | 1)
        return total % 2**64
