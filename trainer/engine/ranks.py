"""Work that ranks do together: a fault on one of them is a fault on all, in the same words.

Invariant: whatever way a piece of work ends, every rank leaves it by the same door; none waits in a
collective for one that has given up. Knows nothing of how ranks exchange values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forescale.errors import UserError, storage_error


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Ranks:
    """This rank among `size`; `gather` returns everybody's value, on every rank, in rank order;
    `to_main` on rank 0 alone, None on the others."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    to_main: Callable[[Any], list[Any] | None] = _alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def together(self, work: Callable[[], Any], where: Path) -> list[Any]:
        """Do `work` on every rank; everybody's result, in rank order. Every rank calls it.

        Raises the UserError of the first rank that failed, on all ranks; `where` names the place
        in it if the fault doesn't.
        """
        words = self.gather(_tried(work, where))
        for _, fault in words:
            if fault is not None:
                raise fault
        return [result for result, _ in words]

    def handed_in(self, work: Callable[[], Any], where: Path) -> list[Any] | None:
        """As `together`, for results that only rank 0 needs, None on the others: what everybody
        gets costs as much as there are ranks, squared."""
        result, own = _tried(work, where)
        for fault in self.gather(own):
            if fault is not None:
                raise fault
        return self.to_main(result)

    def from_main(self, work: Callable[[], Any], where: Path) -> Any:
        """Do `work` on rank 0; its result, or its UserError, on every rank."""
        return self.together(work if self.is_main else _nothing, where)[0]


def _tried(work: Callable[[], Any], where: Path) -> tuple[Any, UserError | None]:
    try:
        return work(), None
    except UserError as e:
        return None, e
    except OSError as e:
        return None, storage_error(e) or _unknown(e, where)


def _nothing() -> None:
    return None


def _unknown(error: OSError, where: Path) -> UserError:
    what = f"the storage fails ({error.strerror or error})"
    return UserError(str(error.filename or where), what, "check it, then give the command again")


ALONE = Ranks()
