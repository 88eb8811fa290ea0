"""What ranks exchange and do together: one gather, and one "rank 0 decides, the others receive".

Many ranks exchange over a tree of small groups, so that what each holds open, and what it receives
of a merge, grows with the logarithm of their number. Invariant: an error on one rank is raised on
all ranks with the same sentence, so that no rank waits in a collective for one that has given up.
Values travel as JSON in tensors, errors as their plain fields: what arrives is only ever parsed, so
that a stranger on the network can't run code in a rank (torch's own exchange of objects unpickles
them). A rank alone needs no torch.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from forescale.config.schema import ConfigError, Problem
from forescale.ground.errors import Transient, UserError, storage_error, unknown_storage_error

FANOUT = 64  # ranks of a group; so many and fewer exchange in one. Whole nodes of 2^n ranks fit

Merge = Callable[[list[Any]], Any]


def joined(parts: Iterable[Iterable[Any]]) -> list[Any]:
    """Return the items of all lists, in their order."""
    return [item for part in parts for item in part]


def first(parts: Sequence[Any]) -> Any:
    return parts[0]


class Ranks:
    """This rank among `size`, in a process group of torch.distributed (None: the default group).

    Every rank calls each method, in the same order. tree: over which they exchange values; None:
    within the group.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, tree: "Tree | None" = None):
        self.rank, self.size, self.group, self.tree = rank, size, group, tree

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on all ranks. A synchronisation.

        For values whose sum doesn't grow with the ranks, such as shares of the data: 100 bytes of
        each of 16,384 ranks are 1.6 MB for each, 27 GB in all. Else `reduce_on_main`, or `merged`.
        value: of JSON's types; from another rank a tuple arrives as a list.
        """
        if self.size == 1:
            return [value]
        if self.tree:
            return self.tree.merged([value], joined)
        import torch.distributed as dist

        mine = self._packed(value)
        parts = [mine.new_empty(len(mine)) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return [_unpacked(part) for part in parts]

    def merged(self, value: Any, merge: Merge) -> Any:
        """Return on all ranks the merge of their values in rank order. As `gather`.

        merge: makes one value of several, which may be merges of neighbours' values themselves.
        """
        return self.tree.merged(value, merge) if self.tree else merge(self.gather(value))

    def merged_to_main(self, value: Any, merge: Merge) -> Any:
        """Return the same on rank 0; None on the others."""
        if self.tree:
            return self.tree.merged_to_main(value, merge)
        values = self.gather_to_main(value)
        return None if values is None else merge(values)

    def gather_to_main(self, value: Any) -> list[Any] | None:
        """Return every rank's value, in rank order, on rank 0; None on the others. As `gather`."""
        if self.size == 1:
            return [value]
        if self.tree:
            return self.tree.merged_to_main([value], joined)
        import torch.distributed as dist

        mine = self._packed(value)
        empty = [mine.new_empty(len(mine)) for _ in range(self.size)] if self.is_main else None
        dist.gather(mine, empty, group=self.group, group_dst=0)
        return [_unpacked(part) for part in empty] if empty else None

    def reduce_on_main(self, value: Any, work: Callable[[list[Any]], Any]) -> Any:
        """Return on all ranks what `work`, which never fails, makes on rank 0 of every rank's value
        in rank order: a rank receives as much at any number of them. As `gather`."""
        values = self.gather_to_main(value)
        return self.broadcast(None if values is None else work(values))

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on all ranks. As `gather`."""
        if self.size == 1:
            return value
        if self.tree:
            return self.tree.broadcast(value)
        import torch.distributed as dist

        data = self._packed(value if self.is_main else 0)
        dist.broadcast(data, group=self.group, group_src=0)
        return _unpacked(data)

    def dealt(self, values: Sequence[Any] | None) -> Any:
        """Return this rank's of the values that rank 0 has for each rank, in their order. As
        `gather`."""
        if self.tree:
            return self.tree.dealt(values)
        return self.broadcast(values)[self.rank]

    def _packed(self, value: Any) -> Any:
        """Return a value as bytes in a tensor as long as the longest of all ranks."""
        import torch
        import torch.distributed as dist

        raw = json.dumps(value, separators=(",", ":")).encode()
        cuda = dist.get_backend(self.group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        length = torch.tensor([len(raw)], dtype=torch.int64, device=device)
        dist.all_reduce(length, op=dist.ReduceOp.MAX, group=self.group)
        raw = raw.ljust(int(length))  # JSON ignores spaces
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device)

    def sum(self, tensor: Any) -> Any:
        """Sum a tensor over ranks, in place, and return it."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, group=self.group)
        return tensor

    def swap(self, before: "Ranks", out: Any, into: Any) -> None:
        """Of two ranks each: send the tensor `out` to the other one here, and receive `into` from
        the other one of `before`; None: nothing."""
        import torch.distributed as dist

        sending = out is not None and dist.isend(out, group=self.group, group_dst=1 - self.rank)
        if into is not None:
            dist.recv(into, group=before.group, group_src=1 - before.rank)
        if sending:
            sending.wait()

    def together(
        self, work: Callable[[], Any], where: Path | None = None, merge: Merge | None = None
    ) -> Any:
        """Do `work` on every rank; return all results, in rank order, on all ranks, or the merge of
        them. As `merged`.

        Raises on all ranks the UserError of the first rank that failed. An OSError becomes a
        UserError that names `where`; without `where` it stays as it is, unless storage_error knows
        what to do about it.
        """
        result, local_error = _tried(work, where)
        merge_results = merge or joined

        def merge_both(parts: list[Any]) -> list[Any]:
            error = next((error for _, error in parts if error is not None), None)
            return [None if error else merge_results([result for result, _ in parts]), error]

        error = None if local_error is None else [self.rank, error_fields(local_error)]
        result, error = self.merged([result if merge else [result], error], merge_both)
        if error is not None:
            rank, fields = error
            raise local_error if local_error and rank == self.rank else error_of(fields)
        return result

    def together_for_main(self, work: Callable[[], Any], where: Path, merge: Merge) -> Any:
        """As `together`, but only rank 0 receives the merge; the others get None. A result that all
        ranks receive costs time and memory that grow with the square of their number."""
        results: list[Any] = []
        self.together(lambda: results.append(work()), where, first)
        return self.merged_to_main(results[0], merge)

    def from_main(self, work: Callable[[], Any], where: Path | None = None) -> Any:
        """Do `work` on rank 0; return its result, or raise its error, on every rank. The result is
        of JSON's types."""
        return self.together(work if self.is_main else lambda: None, where, first)

    def main_first(self, work: Callable[[], Any]) -> Any:
        """Do `work` on rank 0, then on the others, which find on disk what rank 0 has made. Return
        each rank's own result. Raises rank 0's UserError on all ranks."""
        results: list[Any] = []
        self.from_main(lambda: results.append(work()))
        return results[0] if results else work()


class Tree:
    """A rank's groups in a tree: of the ranks of a group, the first is in one of the next level.

    levels: this rank in each of its groups, lowest first. Rank 0 is in one of each level.
    """

    def __init__(self, levels: Sequence[Ranks]):
        self.levels = levels

    @classmethod
    def of(cls, rank: int, size: int, grouped: Callable[[list[int]], Ranks]) -> "Tree | None":
        """Return the tree of `size` ranks for one of them; None: a single group has them all.
        grouped: returns this rank among peers, whose numbers increase. It is called equally often
        on each rank: torch names a group by its ranks and by how many groups they had before."""
        levels, stride = [], 1
        while size > FANOUT and stride < size:
            begin = rank - rank % (stride * FANOUT)
            peers = [*range(begin, min(begin + stride * FANOUT, size), stride)]
            leads = rank % stride == 0  # it stands for its block of the level below
            level = grouped(peers if leads else [rank])
            levels += [level] if leads else []
            stride *= FANOUT
        return cls(levels) if levels else None

    def merged_to_main(self, value: Any, merge: Merge) -> Any:
        """As `Ranks.merged_to_main`."""
        for level in self.levels:
            values = level.gather_to_main(value)
            value = None if values is None else merge(values)
        return value

    def merged(self, value: Any, merge: Merge) -> Any:
        """As `Ranks.merged`."""
        return self.broadcast(self.merged_to_main(value, merge))

    def broadcast(self, value: Any) -> Any:
        """As `Ranks.broadcast`."""
        for level in reversed(self.levels):
            value = level.broadcast(value)
        return value

    def dealt(self, values: Any) -> Any:
        """As `Ranks.dealt`."""
        stride = FANOUT ** len(self.levels)
        for level in reversed(self.levels):
            stride //= FANOUT  # ranks that a member of the level stands for
            begin = level.rank * stride
            values = level.broadcast(values)[begin : begin + stride]
        return values[0]


class LastStage(Ranks):
    """The ranks that read different windows; of a pipeline, values of its last stage count."""

    def __init__(self, ranks: Ranks, pipeline: Ranks):
        super().__init__(ranks.rank, ranks.size, ranks.group, ranks.tree)
        self.pipeline = pipeline

    def gather(self, value: Any) -> list[Any]:
        """As `Ranks.gather`, of the last stage."""
        values: list[Any] = self.pipeline.gather(super().gather(value))[-1]
        return values

    def reduce_on_main(self, value: Any, work: Callable[[list[Any]], Any]) -> Any:
        """As `Ranks.reduce_on_main`, of the last stage."""
        return self.pipeline.gather(super().reduce_on_main(value, work))[-1]


def _tried(work: Callable[[], Any], where: Path | None) -> tuple[Any, UserError | OSError | None]:
    try:
        return work(), None
    except UserError as e:
        return None, e
    except OSError as e:
        return None, storage_error(e) or (unknown_storage_error(e, str(where)) if where else e)


def _unpacked(part: Any) -> Any:
    return json.loads(bytes(part.cpu().numpy()))


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
