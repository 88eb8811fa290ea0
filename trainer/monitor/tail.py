"""The last rows of a long file: enough for most of what a table of runs shows."""

from collections import deque
from typing import IO

from forescale.monitor.follow import BLOCK, TRAIN, Follower, lines_of
from forescale.run.rows import Row, parse_row

RECENT = 20  # rows
_SCORE = b'"kind": "validation"'


class Tail(Follower):
    """The last train rows and validation rows of a metrics.jsonl, RECENT of each at most; at least
    one validation row, if there is any. Rows before them are not read, nor verified."""

    def _forget(self) -> None:
        super()._forget()
        self._steps: deque[bytes] = deque(maxlen=RECENT)
        self._scores: deque[bytes] = deque(maxlen=RECENT)

    @property
    def steps(self) -> list[Row]:
        """The last train rows."""
        return [*map(parse_row, self._steps)]

    @property
    def scores(self) -> list[Row]:
        """The last validation rows."""
        return [*map(parse_row, self._scores)]

    def _begin(self, f: IO[bytes]) -> int:
        end = f.seek(0, 2)
        size = 2 * BLOCK
        while size < end:
            f.seek(end - size)
            block = f.read(size)
            cut = block.find(b"\n") + 1  # the end of a row that is not whole
            if block.count(TRAIN, cut) >= RECENT and block.find(_SCORE, cut) >= 0:
                return end - size + cut
            size *= 4
        return 0

    def _take(self, lines: list[bytes]) -> None:
        self._steps.extend(lines_of(b"train", lines))
        self._scores.extend(lines_of(b"validation", lines))
