"""Tables: a column of text, of .parquet files by row groups and of Hugging Face data sets by rows.

Invariant: a document is named by its row, counted from 0 in its table, however the table is cut;
the cuts depend only on the table. A parquet file is decoded in small batches, in which a text of
many rows stands once; a data set stays in its memory map: neither is held in memory as a whole.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forescale.data.text.documents import Document, Intake
from forescale.data.text.opening import HUB, Total, open_raw, printable, reading
from forescale.ground.errors import UserError

_ROWS = 128  # rows decoded at once
_BUFFER = 1 << 20  # bytes of a column read at once
_NAMED = 20  # maximum columns named in a message
_TEXT = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def parquet_parts(where: str, key: str, part_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield row groups [first, last) of about `part_bytes`, uncompressed, and their size in bytes.

    Raises UserError if the file is damaged or has no text column under the key.
    """
    with open_parquet(where) as file:
        text_path(where, file.schema_arrow, key)
        first = held = 0
        for index in range(file.metadata.num_row_groups):
            # All columns together: reading one column's size of a damaged file crashes pyarrow.
            held += file.metadata.row_group(index).total_byte_size
            if held >= part_bytes or index + 1 == file.metadata.num_row_groups:
                yield first, index + 1, held
                first, held = index + 1, 0


def read_parquet(
    intake: Intake, name: str, where: str, first: int, last: int
) -> Iterator[Document]:
    """Yield the documents of row groups, named like "a.parquet:17"; last 0: to the end."""
    pages, texts = Total(where), Total(where)
    with open_parquet(where) as file:
        has_url = bool(_url_path(file.schema_arrow, intake.url_key))
        columns = [intake.key, *[intake.url_key] * has_url]
        _expect_columns(where, file.schema_arrow, intake)
    with open_parquet(where, columns) as file:
        path = text_path(where, file.schema_arrow, intake.key)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        if not sum(sizes):
            yield from intake.documents(name, b"")
        last = last or len(sizes)
        row, end = sum(sizes[:first]), sum(sizes[:last])
        for group in range(first, last):
            pages.add(file.metadata.row_group(group).total_byte_size)
        for batch in file.iter_batches(
            _ROWS, range(first, last), [*columns, *intake.where.rules], use_threads=False
        ):
            for document in _documents(intake, name, row, batch, path):
                texts.add(len(document.text))
                yield document
            row += len(batch)
        if row != end or sum(sizes) != file.metadata.num_rows:
            raise EOFError("its numbers of rows disagree")


@contextmanager
def open_parquet(where: str, repeated: list[str] | None = None) -> Iterator[Any]:
    """Yield an open parquet file. repeated: columns that stay as indices of their values, as they
    are stored: a row of 4 bytes may stand for a text of a gigabyte."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_raw(where) as raw, reading(where):
        try:
            # Without pre_buffer a column is read page by page, not a whole row group at once.
            yield pq.ParquetFile(
                raw,
                buffer_size=_BUFFER,
                pre_buffer=False,
                page_checksum_verification=True,
                read_dictionary=repeated,
            )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
            if getattr(e, "errno", None) is not None:
                raise
            raise EOFError(str(e).partition("\n")[0].rstrip(".")) from e


def load_hub(spec: str) -> Any:
    """Return the data set of "hf://NAME[/CONFIG][@REVISION][:SPLIT]", downloaded or from the cache;
    or one file of it, "hf://datasets/OWNER/NAME/PATH.parquet" (.json, .jsonl).

    NAME is a name on the hub or a local folder; the default split is train. The data set is
    downloaded as a whole, not streamed: only then is the number of rows known, and each row can be
    read on its own. Raises UserError.
    """
    try:
        import datasets
    except ImportError:
        todo = "pip install datasets"
        raise UserError(spec, "needs the package datasets, which isn't installed", todo) from None
    name, _, split = spec.removeprefix(HUB).removeprefix("datasets/").partition(":")
    suffix = Path(name).suffix if spec.startswith(f"{HUB}datasets/") else ""
    split, folder = split or "train", Path(name).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, dict) and split not in saved:
                todo = f"choose one of {', '.join(saved)}"
                raise UserError(spec, f"has no split {split!r}", todo)
            return saved[split] if isinstance(saved, dict) else saved
        if kind := {".parquet": "parquet", ".json": "json", ".jsonl": "json"}.get(suffix):
            return datasets.load_dataset(kind, data_files={"train": spec}, split="train")
        if folder.is_dir():
            return datasets.load_dataset(str(folder), split=split)
        name, _, revision = name.partition("@")
        owner, _, rest = name.partition("/")
        title, _, config = rest.partition("/")
        name = f"{owner}/{title}" if title else owner
        return datasets.load_dataset(name, config or None, split=split, revision=revision or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        reason = str(e).strip().partition("\n")[0].rstrip(".") or type(e).__name__
        todo = "check its name, CONFIG and split (hf://NAME/CONFIG:SPLIT) and the network"
        raise UserError(spec, f"can't be loaded ({reason})", todo) from e


def hub_parts(spec: str, table: Any, key: str, part_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield rows [first, last) that hold about `part_bytes` of text, and the approximate bytes."""
    path = text_path(spec, table.features.arrow_schema, key)
    data = table.select_columns([path[0]]).data
    mean = max(1.0, data.nbytes / max(1, data.num_rows))
    rows = max(1, int(part_bytes / mean))
    for first in range(0, len(table), rows):
        last = min(first + rows, len(table))
        yield first, last, int((last - first) * mean)


def read_hub(intake: Intake, name: str, table: Any, first: int, last: int) -> Iterator[Document]:
    """Yield the documents of rows, named like "owner/title:17"; last 0: to the end."""
    path = text_path(name, table.features.arrow_schema, intake.key)
    of_url = _url_path(table.features.arrow_schema, intake.url_key)
    _expect_columns(name, table.features.arrow_schema, intake)
    names = [*dict.fromkeys([path[0], *of_url[:1], *intake.where.rules])]
    table = table.select_columns(names).with_format("arrow")
    last = last or len(table)
    if not len(table):
        yield from intake.documents(name, b"")
    for row in range(first, last, _ROWS):
        batch = table[row : min(row + _ROWS, last)]
        yield from _documents(intake, name, row, batch, path)


def text_path(where: str, schema: Any, key: str) -> list[str]:
    """Return the path to a text column: its name, or names from struct to field for "meta.text"."""
    import pyarrow as pa

    path = [key] if key in schema.names else key.split(".")
    kind: Any = pa.struct(schema)
    for depth, part in enumerate(path):
        names = [field.name for field in kind] if pa.types.is_struct(kind) else []
        if part not in names:
            inside = f" in {'.'.join(path[:depth])}" if depth else ""
            todo = f"set text_key (columns: {', '.join(names[:_NAMED]) or 'none'}{inside})"
            raise UserError(printable(where), f"has no column {key!r}", todo)
        kind = kind.field(part).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind) not in _TEXT:
        problem = f"column {key!r} holds {kind}, not text"
        raise UserError(printable(where), problem, "choose another text_key")
    return path


def _documents(
    intake: Intake, name: str, row: int, batch: Any, path: list[str]
) -> Iterator[Document]:
    """Yield the documents of a column; `row` is the number of the first."""
    import pyarrow as pa

    column = _column(batch, path)
    places: Iterable[int | None] = range(len(column))
    if pa.types.is_dictionary(column.type):
        places, column = column.indices.to_pylist(), column.dictionary
    texts = column.cast(pa.large_binary())  # nothing has checked yet that they are UTF-8
    urls: Iterable[str] = [""] * len(batch)
    if path_of_url := _url_path(batch.schema, intake.url_key):
        urls = _urls(_column(batch, path_of_url))
    fields = [batch.column(key).to_pylist() for key in intake.where.rules]
    values = [dict(zip(intake.where.rules, of, strict=True)) for of in zip(*fields, strict=True)]
    for number, (place, url) in enumerate(zip(places, urls, strict=True), row):
        if place is None or (text := texts[place].as_py()) is None:
            intake.report.add(f"no text under {intake.key!r}", f"{name}:{number}")
        elif not values or intake.reads(f"{name}:{number}", values[number - row].get):
            yield from intake.documents(f"{name}:{number}", text, url=url)


def _expect_columns(where: str, schema: Any, intake: Intake) -> None:
    for key in intake.where.rules:
        if len(schema.get_all_field_indices(key)) != 1:
            todo = f"choose one of its columns ({', '.join(schema.names[:_NAMED])})"
            raise UserError(f"where.{key}", f"{printable(where)} has no such column", todo)


def _column(batch: Any, path: list[str]) -> Any:
    """Return a column, or the field of a struct that a path names."""
    import pyarrow.compute as pc

    column = batch.column(path[0])
    return pc.struct_field(column, path[1:]) if path[1:] else column


def _url_path(schema: Any, key: str) -> list[str]:
    """Return the path to the column of addresses, as `text_path`; [] unless there is one such
    column, of text."""
    top = key if key in schema.names else key.partition(".")[0]
    try:
        return text_path("", schema, key) if len(schema.get_all_field_indices(top)) == 1 else []
    except UserError:
        return []


def _urls(column: Any) -> Iterator[str]:
    """Yield the addresses of a column; "" where there is none. One of many rows is decoded alone,
    not copied for each."""
    import pyarrow as pa

    places: Iterable[int | None] = range(len(column))
    if pa.types.is_dictionary(column.type):
        places, column = column.indices.to_pylist(), column.dictionary
    texts = column.cast(pa.large_binary())
    for place in places:
        raw = None if place is None else texts[place].as_py()
        yield "" if raw is None else raw.decode("utf-8", "replace")
