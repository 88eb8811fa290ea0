"""What ranks exchange and do together: one gather, and one "rank 0 decides, the others receive".

Invariant: an error on one rank is raised on all ranks with the same sentence, so that no rank waits
in a collective for one that has given up. A rank alone needs no torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from forescale.errors import UserError, storage_error, unknown_storage_error


class Ranks:
    """This rank among `size`, in a process group of torch.distributed (None: the default group).

    Every rank calls each method, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None):
        self.rank, self.size, self.group = rank, size, group

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on all ranks. A synchronisation."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_to_main(self, value: Any) -> list[Any] | None:
        """Return every rank's value, in rank order, on rank 0; None on the others."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def together(self, work: Callable[[], Any], where: Path | None = None) -> list[Any]:
        """Do `work` on every rank; return all results, in rank order, on all ranks.

        Raises on all ranks the UserError of the first rank that failed. An OSError becomes a
        UserError that names `where`; without `where` it stays as it is, unless storage_error knows
        what to do about it.
        """
        found = self.gather(_tried(work, where))
        for _, error in found:
            if error is not None:
                raise error
        return [result for result, _ in found]

    def together_for_main(self, work: Callable[[], Any], where: Path) -> list[Any] | None:
        """As `together`, but only rank 0 receives the results; the others get None. A result that
        all ranks receive costs time and memory that grow with the square of their number."""
        result, own = _tried(work, where)
        for error in self.gather(own):
            if error is not None:
                raise error
        return self.gather_to_main(result)

    def from_main(self, work: Callable[[], Any], where: Path | None = None) -> Any:
        """Do `work` on rank 0; return its result, or raise its error, on every rank."""
        return self.together(work if self.is_main else _nothing, where)[0]

    def main_first(self, work: Callable[[], Any]) -> Any:
        """Do `work` on rank 0, then on the others, which find on disk what rank 0 has made. Return
        each rank's own result. Raises rank 0's UserError on all ranks."""
        own: list[Any] = []
        self.from_main(lambda: own.append(work()))
        return own[0] if own else work()


def _tried(work: Callable[[], Any], where: Path | None) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except UserError as e:
        return None, e
    except OSError as e:
        return None, storage_error(e) or (unknown_storage_error(e, str(where)) if where else e)


def _nothing() -> None:
    return None


ALONE = Ranks()
