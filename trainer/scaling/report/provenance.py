"""Where every number of a report is from: runs, how they count, what they read, by what they were
made; and the records themselves, inside of the page.

Invariant: nothing here is of the moment: the same records by the same versions say the same.
"""

import base64
import hashlib
import platform
import shlex
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from forescale.scaling.analysis.answer import StudyFit
from forescale.scaling.report.evidence import Evidence
from forescale.scaling.report.sections import Cell, Section, number
from forescale.storage import hash_file

RECORDS = "records.csv"
_PACKAGES = ("forescale", "numpy", "scipy", "pandas", "plotly")
# Of records, by what the page calls them: one value for all, or each with how many have it.
_SHARED = {
    "Loss": "loss_definition",
    "Data": "data",
    "Corpus": "corpus",
    "Validation": "validation_hash",
    "Tokenizer": "tokenizer",
    "Vocabulary": "vocab_size",
    "Sequence length": "sequence_length",
    "Optimizer": "optimizer",
    "Schedule": "schedule",
    "Precision": "precision",
    "Parametrization": "parametrization",
    "Code of the runs": "code_version",
    "torch of the runs": "torch_version",
    "Hardware": "device",
    "Ranks a run": "world_size",
}
_MOST = 4  # different values that are listed


def as_csv(records: pd.DataFrame) -> bytes:
    """UTF-8, every digit."""
    return records.to_csv(index=False).encode()


def provenance(
    made: StudyFit | str, seen: Evidence, where: str, command: Sequence[str]
) -> Section:  # fmt: skip
    """where: the file, or what the runs are called; command: the words that made the page."""
    file = Path(where)
    rows: list[list[Cell]] = [
        ["Runs", where],
        ["SHA-256", hash_file(file).sha256 if file.is_file() else "not one file"],
        ["Records", _link(seen.records)],
    ]
    if isinstance(made, StudyFit):
        rows += _of_fit(made, seen)
    rows += _of_runs(seen)
    rows += [
        ["This page by", ", ".join(f"{name} {v}" for name, v in _versions().items())],
        ["Command", Markup("<code>{}</code>").format(shlex.join(command))],
    ]
    return Section("provenance", "Where the numbers are from", rows=rows)


def counted(made: StudyFit) -> tuple[str, str, str]:
    """How N and C and the loss are counted. A table's own columns are what its makers counted."""
    table, p = made.table, made.every
    size = "as the table counts" if "parameters" in table else made.job.size.replace("_", " ")
    cost = "as the table counts" if "flops" in table else made.job.cost
    ours = "validation" in table or "loss_definition" in table
    unit = "nats a token" if ours else "the table's unit"
    return size, "6 N D" if p.flops is None else cost, unit


def _link(records: pd.DataFrame) -> Cell:
    """The page holds them: a click saves them."""
    data = as_csv(records)
    told = '<a download="{}" href="data:text/csv;base64,{}">{}</a>, {} rows, {} columns, SHA-256 {}'
    digest, coded = hashlib.sha256(data).hexdigest(), base64.b64encode(data).decode()
    return Markup(told).format(RECORDS, coded, RECORDS, *records.shape, digest)


def _of_fit(made: StudyFit, seen: Evidence) -> list[list[Cell]]:
    job, (size, cost, unit) = made.job, counted(made)
    chosen = [f"{k} = {v}" for k, v in job.rows.items()]
    chosen += [f"{ours} is its {theirs!r}" for ours, theirs in job.columns.items()]
    aside = len(seen.records) - len(made.every)
    more = f"; {aside} more are crosses, checks, repeats, or have no loss" if aside > 0 else ""
    own = [["Chosen of it", "; ".join(chosen) or "all, by its own names"]]
    return [
        *(own if not seen.folder else []),
        ["Fitted to", f"{len(made.points)} of {len(made.every)} runs{more}"],
        ["N", size],
        ["C", cost],
        ["D", "tokens of training, repeated ones included" if "steps" in made.table
         else "as the table counts" if "tokens" in made.table else "C / 6 N"],
        *([["Loss", unit]] if "loss_definition" not in seen.records else []),
        ["Law", made.form.source],
        ["Objective", str(made.fit.objective)],
        ["Resampling", f"{job.bootstraps} fits, {job.resample} where it applies, seed {job.seed}"],
    ]  # fmt: skip


def _of_runs(seen: Evidence) -> list[list[Cell]]:
    table = seen.records
    rows: list[list[Cell]] = [
        [label, _values(table[column])] for label, column in _SHARED.items() if column in table
    ]
    if seen.versions:
        each = (f"{name} {' and '.join(found)}" for name, found in seen.versions.items())
        rows.append(["Packages of the runs", ", ".join(each)])
    if "device_hours" in table and table["device_hours"].notna().all():
        hours = number(float(table["device_hours"].sum()), 4)
        rows.append(["Device-hours", Markup("{} in {} runs").format(hours, len(table))])
    if seen.times:
        rows.append(["Trained", " to ".join(map(_utc, seen.times))])
    if seen.folder:
        told = f"{seen.folder}: study.yaml, plan.json, events.jsonl, cells, forecasts"
        rows.append(["Study", told])
    return rows


def _values(column: pd.Series) -> str:
    counts = column.astype(object).where(column.notna(), "not known").value_counts(sort=True)
    if len(counts) == 1:
        return str(counts.index[0])
    found = [f"{value} ({n} runs)" for value, n in counts.items()]
    more = f" and {len(found) - _MOST} others" if len(found) > _MOST else ""
    return "; ".join(found[:_MOST]) + more


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
