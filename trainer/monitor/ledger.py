"""The sums over the steps of a run, for views of files with a million rows.

Invariant: the sums are those of all rows, each of which was verified; see follow.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from forescale.monitor.follow import BLOCK, TRAIN, Follower, lines_of
from forescale.run.rows import Row, each_row, parse_row

_SECONDS = b'"seconds": {'


@dataclass
class Steps:
    """The sums over the steps of one attempt.

    last: the newest step; first: seconds by phase of the oldest one; seconds: of all, by phase.
    """

    count: int = 0
    last: int = 0
    first: Mapping[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of all of them, in all phases."""
        return sum(self.seconds.values())

    def without(self, later: "Steps | None") -> "Steps":
        """Return the steps that are not in `later`, the same attempt's steps in another file, or
        only its first ones; None: that file has none of them."""
        if later is None:
            return self
        if later.last >= self.last:
            return Steps()
        left = {k: max(0.0, v - later.seconds.get(k, 0.0)) for k, v in self.seconds.items()}
        return Steps(self.count - later.count, self.last, {}, left)


class Ledger(Follower):
    """The steps in a metrics.jsonl, by the number of the attempt that made them.

    attempt: only rows from the first one of this attempt on; the copied ones before it are skipped.
    longest: seconds of the longest step with its evaluation and save.
    """

    def __init__(self, path: Path, attempt: int | None = None):
        self.attempt = attempt
        super().__init__(path)

    def _forget(self) -> None:
        super()._forget()
        self.by_attempt: dict[int, Steps] = {}
        self.longest = 0.0

    def _begin(self, f: IO[bytes]) -> int:
        return 0 if self.attempt is None else first_of(self.path, self.attempt)

    def _take(self, lines: list[bytes]) -> None:
        trains = [line for line in lines if line.startswith(TRAIN)]
        others = [line for line in lines if not line.startswith(TRAIN)]
        if any(lines_of(b"train", others)) or not self._take_run(trains):
            for row in map(parse_row, lines_of(b"train", lines)):
                seconds = row.get("seconds", {})
                self._add(row, 1, seconds, seconds, sum(seconds.values()))

    def _take_run(self, lines: Sequence[bytes]) -> bool:
        """Add consecutive steps of one attempt that have the same phases, without parsing each row.
        Return False, with nothing added, if they are anything else."""
        if not lines:
            return True
        first, last = parse_row(lines[0]), parse_row(lines[-1])
        names = list(first.get("seconds", ()))
        same = (first["attempt"], first["step"] + len(lines), names)
        if same != (last["attempt"], last["step"] + 1, list(last.get("seconds", ()))) or not names:
            return False
        # Only the numbers of `"seconds": {"data": 0.1, "compute": 0.2}` are left of each line.
        _, *parts = b"\n".join(lines).split(_SECONDS)
        text = b", ".join([part.partition(b"}")[0] for part in parts])
        for name in names:
            text = text.replace(json.dumps(name).encode() + b": ", b"")
        try:
            values = [*map(float, text.split(b", "))]
        except ValueError:  # other phases in between
            return False
        if len(parts) != len(lines) or len(values) != len(lines) * len(names):
            return False
        sums = {name: sum(values[i :: len(names)]) for i, name in enumerate(names)}
        longest = 0.0
        if max(values) * len(names) > self.longest:  # else no step is longer
            longest = max(map(sum, zip(*[iter(values)] * len(names), strict=True)))
        self._add(last, len(lines), first["seconds"], sums, longest)
        return True

    def _add(
        self,
        last: Row,
        count: int,
        first: Mapping[str, float],
        seconds: Mapping[str, float],
        longest: float,
    ) -> None:
        steps = self.by_attempt.setdefault(last["attempt"], Steps(first=first))
        steps.count += count
        steps.last = last["step"]
        for phase, spent in seconds.items():
            steps.seconds[phase] = steps.seconds.get(phase, 0.0) + spent
        self.longest = max(self.longest, longest)


def first_of(path: Path, attempt: int) -> int:
    """Return the offset of the first row of an attempt, or of a later one; the file's end if there
    is none. Rows are in the order of attempts, so few are read. (Rows of other kinds than steps may
    not say of which attempt they are.)"""
    low, high = 0, path.stat().st_size
    while high - low > BLOCK:
        middle = (low + high) // 2
        rows = each_row(path, middle)
        row = next((each for each in rows if "attempt" in each[0]), None)
        if row is not None and row[0]["attempt"] < attempt:
            low = row[1]
        else:
            high = middle
    for later, end in each_row(path, low):
        if later.get("attempt", 0) >= attempt:
            break
        low = end
    return low
