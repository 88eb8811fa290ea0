"""The text of a dataset beside its shards, as tables: text-000012.parquet has the documents of a
unit, in source order, with what the steps of a curation found out about them.

    id         file and row, such as web.jsonl@1234; source: the input; split: train or validation
    url, domain, bytes, text     and a column for each attribute, such as language or score

Invariant: the rows are the documents of the shards, each once; of a document whose last part is
held out there are two. A file depends on its unit, the selection and the version of pyarrow alone.
Memory: about 100 MB, and some times the longest document.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forescale.data.curate.tally import domain_of
from forescale.data.prepare.columns import UnitWriter, is_whole
from forescale.data.prepare.pool import Tick
from forescale.data.prepare.selection import SPLITS, Part, Selection
from forescale.data.text.documents import ReadingReport, Unit
from forescale.ground.storage import fsync_path, hash_file

_GROUP = 16 << 20  # bytes of text in a group of rows
_COLUMNS = {
    **dict.fromkeys(("id", "source", "split", "url", "domain"), pa.string()),
    "bytes": pa.int64(),
    "text": pa.large_string(),
}


@dataclass(frozen=True)
class ParquetJob:
    """Write the table of a unit into `stage`, and its counts and hash into `rows`. attributes:
    whether each is a text, and not a number; sources: names of the inputs."""

    selection: Selection
    rows: Path
    parts: Path
    stage: Path
    attributes: Mapping[str, bool]
    sources: Sequence[str]

    def __call__(self, number: int, unit: Unit, tick: Tick) -> None:
        name = f"text-{number:06d}.parquet"
        if not is_whole(self.rows / name, self.stage):
            counts = dict.fromkeys(SPLITS, 0)
            with TemporaryDirectory(dir=self.parts) as folder:
                path = Path(folder, name)
                with pq.ParquetWriter(path, self.schema, compression="zstd") as out:
                    for parts in _groups(self.selection.parts(number, unit, ReadingReport())):
                        rows = [self._row(part, self.sources[unit.source]) for part in parts]
                        out.write_table(pa.Table.from_pylist(rows, self.schema))
                        for part in parts:
                            counts[part.split] += 1
                fsync_path(path)
                entry = hash_file(path)
                os.replace(path, self.stage / name)
            with UnitWriter(self.rows / name) as out_of_facts:
                row = {"file": name, "sha256": entry.sha256, **counts}
                out_of_facts.finish({"row": row, "files": {name: vars(entry)}})
        tick(unit.size, 0)

    @property
    def schema(self) -> pa.Schema:
        """The columns; an attribute with the name of another column gets `_` at its end."""
        kinds = {name: pa.string() if is_text else pa.float64()
                 for name, is_text in sorted(self.attributes.items())}  # fmt: skip
        return pa.schema({**_COLUMNS, **{_column(name): kind for name, kind in kinds.items()}})

    def _row(self, part: Part, source: str) -> dict[str, Any]:
        url, row = part.document.url, dict[str, Any]()
        for name, value in part.document.attributes.items():
            if value is not None:  # as a step of the user may set it
                row[_column(name)] = str(value) if self.attributes[name] else float(value)
        row |= {"id": part.name, "source": source, "split": part.split, "url": url or None}
        row |= {"domain": domain_of(url) or None, "bytes": len(part.text)}
        return {**row, "text": part.text.decode()}


def _column(attribute: str) -> str:
    return f"{attribute}_" if attribute in _COLUMNS else attribute


def _groups(parts: Iterable[Part]) -> Iterator[list[Part]]:
    group: list[Part] = []
    held = 0
    for part in parts:
        group.append(part)
        held += len(part.text)
        if held >= _GROUP:
            yield group
            group, held = [], 0
    if group:
        yield group


def table_faults(where: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each table of a dataset that doesn't have the rows that its manifest
    says, and one if together they don't have all documents."""
    rows = manifest["report"].get("text", {}).get("files", ())
    for row in rows:
        try:
            count = pq.read_metadata(where / row["file"]).num_rows
        except (OSError, pa.ArrowException) as e:
            yield f"{where / row['file']}: can't be read ({e})"
            continue
        if count != (want := sum(row[split] for split in SPLITS)):
            yield f"{where / row['file']}: has {count:,} rows, the manifest says {want:,}"
    for split in SPLITS if rows else ():
        count, want = sum(row[split] for row in rows), manifest["splits"][split]["documents"]
        if count != want:
            yield f"{where}: the tables have {count:,} documents of {split}, the shards {want:,}"
