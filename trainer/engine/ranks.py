"""What ranks exchange and do together: one gather, and one "rank 0 decides, the others receive".

Invariant: an error on one rank is raised on all ranks with the same sentence, so that no rank waits
in a collective for one that has given up. Values travel as JSON in tensors, errors as their plain
fields: what arrives is only ever parsed, so that a stranger on the network can't run code in a rank
(torch's own exchange of objects unpickles them). A rank alone needs no torch.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forescale.config.schema import ConfigError, Problem
from forescale.ground.errors import Transient, UserError, storage_error, unknown_storage_error


class Ranks:
    """This rank among `size`, in a process group of torch.distributed (None: the default group).

    Every rank calls each method, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None):
        self.rank, self.size, self.group = rank, size, group

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on all ranks. A synchronisation.

        value: of JSON's types; from another rank a tuple arrives as a list.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        mine, sizes = self._packed(value)
        parts = [mine.new_empty(len(mine)) for _ in sizes]
        dist.all_gather(parts, mine, group=self.group)
        return _unpacked(parts, sizes)

    def gather_to_main(self, value: Any) -> list[Any] | None:
        """Return every rank's value, in rank order, on rank 0; None on the others. As `gather`."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        mine, sizes = self._packed(value)
        parts = [mine.new_empty(len(mine)) for _ in sizes] if self.is_main else None
        dist.gather(mine, parts, dst=0, group=self.group)
        return _unpacked(parts, sizes) if parts else None

    def _packed(self, value: Any) -> tuple[Any, list[int]]:
        """Return a value as bytes in a tensor as long as the longest of all ranks, and the length
        of each rank's own bytes."""
        import torch
        import torch.distributed as dist

        raw = json.dumps(value, separators=(",", ":")).encode()
        cuda = dist.get_backend(self.group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        length = torch.tensor([len(raw)], dtype=torch.int64, device=device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self.group)
        sizes = [int(n) for n in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return padded.to(device), sizes

    def sum(self, tensor: Any) -> Any:
        """Sum a tensor over ranks, in place, and return it."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, group=self.group)
        return tensor

    def together(self, work: Callable[[], Any], where: Path | None = None) -> list[Any]:
        """Do `work` on every rank; return all results, in rank order, on all ranks. As `gather`.

        Raises on all ranks the UserError of the first rank that failed. An OSError becomes a
        UserError that names `where`; without `where` it stays as it is, unless storage_error knows
        what to do about it.
        """
        result, local_error = _tried(work, where)
        results = self.gather((result, error_fields(local_error)))
        self._raise_first([error for _, error in results], local_error)
        return [value for value, _ in results]

    def together_for_main(self, work: Callable[[], Any], where: Path) -> list[Any] | None:
        """As `together`, but only rank 0 receives the results; the others get None. A result that
        all ranks receive costs time and memory that grow with the square of their number."""
        result, local_error = _tried(work, where)
        self._raise_first(self.gather(error_fields(local_error)), local_error)
        return self.gather_to_main(result)

    def _raise_first(self, errors: Sequence[Any], local_error: Exception | None) -> None:
        """Raise the error of the first rank that has one; local_error: that of this rank."""
        for rank, error in enumerate(errors):
            if error is not None:
                raise local_error if local_error and rank == self.rank else error_of(error)

    def from_main(self, work: Callable[[], Any], where: Path | None = None) -> Any:
        """Do `work` on rank 0; return its result, or raise its error, on every rank. The result is
        of JSON's types."""
        return self.together(work if self.is_main else lambda: None, where)[0]

    def main_first(self, work: Callable[[], Any]) -> Any:
        """Do `work` on rank 0, then on the others, which find on disk what rank 0 has made. Return
        each rank's own result. Raises rank 0's UserError on all ranks."""
        results: list[Any] = []
        self.from_main(lambda: results.append(work()))
        return results[0] if results else work()


def _tried(work: Callable[[], Any], where: Path | None) -> tuple[Any, UserError | OSError | None]:
    try:
        return work(), None
    except UserError as e:
        return None, e
    except OSError as e:
        return None, storage_error(e) or (unknown_storage_error(e, str(where)) if where else e)


def _unpacked(parts: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    raw = [bytes(part[:n].cpu().numpy()) for part, n in zip(parts, sizes, strict=True)]
    return [json.loads(text) for text in raw]


def error_fields(error: UserError | OSError | None) -> dict[str, Any] | None:
    """Return an error as plain fields, of JSON's types."""
    if error is None:
        return None
    if isinstance(error, OSError):
        name = None if error.filename is None else str(error.filename)
        return {"errno": error.errno, "strerror": error.strerror or str(error), "filename": name}
    if isinstance(error, ConfigError):
        return {"problems": error.problems}
    return {"code": error.code, "where": error.where, "problem": error.problem, "todo": error.todo}


def error_of(fields: dict[str, Any]) -> UserError | OSError:
    """Return the error of `error_fields`. Of UserError's classes those arrive that others act on:
    ConfigError and Transient."""
    if "errno" in fields:
        return OSError(fields["errno"], fields["strerror"], fields["filename"])
    if "problems" in fields:
        return ConfigError(Problem(*problem) for problem in fields["problems"])
    kind = Transient if fields["code"] == Transient.code else UserError
    return kind(fields["where"], fields["problem"], fields["todo"])


ALONE = Ranks()
