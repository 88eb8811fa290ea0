"""The log of a campaign: what was tried, what came out, in a chain of hashes.

    campaigns/<name>/log.jsonl    a row for each attempt, pair, prediction and verdict; each row
                                  holds the hash of the one before it, and its own

Invariant: rows are only added. A changed, removed or inserted row breaks the chain, and reading
names the place. A log that is cut at its end has another last hash than the one that was printed.
"""

import time
from pathlib import Path
from typing import Any

from forescale.ground.errors import UserError
from forescale.run.forecast import GENESIS, hash_of
from forescale.run.rows import Row, RowWriter, read_rows


class Ledger:
    """The log of one campaign. Raises UserError if its chain is broken."""

    def __init__(self, path: Path):
        self.path, self._writer = path, RowWriter(path)
        self.rows: list[Row] = read_rows(path) if path.exists() else []
        previous = GENESIS
        for number, row in enumerate(self.rows, 1):
            if (row.get("hash"), row.get("previous")) != (hash_of(row), previous):
                problem = f"row {number}, or the one before it, was changed after it was written"
                raise UserError(str(path), problem, "restore the file from a copy")
            previous = row["hash"]

    @property
    def head(self) -> str:
        """The hash of the last row."""
        return str(self.rows[-1]["hash"]) if self.rows else GENESIS

    def add(self, kind: str, **facts: Any) -> Row:
        """Append a row, durably, and return it."""
        row: Row = {"kind": kind, "time": time.time(), **facts, "previous": self.head}
        row["hash"] = hash_of(row)
        self._writer.add(row)
        self._writer.sync()
        self.rows.append(row)
        return row

    def of(self, kind: str, **facts: Any) -> list[Row]:
        """Return the rows of a kind that have these facts, oldest first."""
        return [
            row for row in self.rows
            if row["kind"] == kind and all(row.get(k) == v for k, v in facts.items())
        ]  # fmt: skip
