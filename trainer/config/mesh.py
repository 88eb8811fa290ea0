"""The ranks of a job as a grid, and where a rank stands in it.

The one place that says which ranks share a micro-batch. What divides the batch counts data groups
(`data`); what divides the states (ZeRO) or counts processes counts all ranks (`world`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """`world` ranks in groups of `sequence` consecutive ones, so that a group lies inside a node.

    The ranks of a group are fed the same windows and each holds a part of their columns; different
    groups are fed different windows. `sequence` divides `world`. So does `experts`: consecutive
    ranks that have the experts of a layer between them, whatever they are fed.
    """

    world: int
    sequence: int = 1
    experts: int = 1

    @property
    def data(self) -> int:
        """The number of groups that are fed different windows."""
        return self.world // self.sequence

    def data_rank(self, rank: int) -> int:
        """Return the number of the group of a rank."""
        return rank // self.sequence

    def sequence_rank(self, rank: int) -> int:
        """Return the place of a rank in its group, and so of its columns in a window."""
        return rank % self.sequence

    def sequence_peers(self, rank: int) -> list[int]:
        """Return the ranks that share the windows of a rank, itself included, in their order."""
        first = rank - self.sequence_rank(rank)
        return [*range(first, first + self.sequence)]

    def data_peers(self, rank: int) -> list[int]:
        """Return the ranks that hold the same columns of other windows, itself included."""
        return [*range(self.sequence_rank(rank), self.world, self.sequence)]

    def expert_peers(self, rank: int) -> list[int]:
        """Return the ranks that have a layer's experts between them, a rank among them, in the
        order of the experts."""
        first = rank - rank % self.experts
        return [*range(first, first + self.experts)]

    def expert_data_peers(self, rank: int) -> list[int]:
        """Return the ranks that have the same experts as a rank, itself included."""
        return [*range(rank % self.experts, self.world, self.experts)]
