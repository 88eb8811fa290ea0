"""Writes weights that no engine holds as a checkpoint of step 0, which runs begin with.

Invariant: one part is in memory at a time, and keeps its number format: readers get fp32 of any.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forescale.checkpoint.reader import Position
from forescale.checkpoint.writer import Snapshot, write
from forescale.engine.portable.fragments import WEIGHT, Fragment
from forescale.engine.ranks import ALONE
from forescale.run.directory import Run

if TYPE_CHECKING:
    from torch import Tensor

_ATTEMPT = 0  # no attempt of the run has saved them


@dataclass(frozen=True)
class Part:
    """A contiguous part of parameter `name`, which as a whole has `shape`, from element `start`.

    described: a tensor on the meta device with the part's number of elements and number format;
    read: returns the part, in any shape.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    described: "Tensor"
    read: Callable[[], "Tensor"]

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.described.nbytes


def write_weights(run: Run, parts: Sequence[Part], tick: Callable[[int], None]) -> None:
    """Publish the parts, which are all parameters of a model, as the run's checkpoint of step 0.

    tick: called with the bytes of a part when it is read. Raises UserError as `writer.write` does.
    """

    def fragment(part: Part) -> Fragment:
        def read() -> "Tensor":
            tick(part.size)
            return part.read()

        data = part.described.view(-1)
        return Fragment(part.name, part.shape, WEIGHT, part.start, data, read=read)

    counters: dict[str, Any] = {"optimizer_steps": {}, "loss_scaler": {}}
    snapshot = Snapshot(Position(), [fragment(part) for part in parts], counters, {})
    write(run, _ATTEMPT, snapshot, ALONE)
