"""Where the numbers of a report come from: the runs, the conventions, the data, the versions; and
the records themselves, inside the page.

Invariant: nothing depends on the moment; the same records and versions give the same section.
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

from forescale.ground.storage import hash_file
from forescale.pages.document import Cell, Section, code, number
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.report.evidence import StudyEvidence

RECORDS = "records.csv"
# Columns of the records by their label on the page: one value for all, or each with its count.
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
    "Ranks per run": "world_size",
}
_MOST = 4  # different values that are listed


def as_csv(records: pd.DataFrame) -> bytes:
    """Return the records as CSV, UTF-8, with all digits."""
    return records.to_csv(index=False).encode()


def provenance(
    study: StudyFit | str, evidence: StudyEvidence, where: str, command: Sequence[str]
) -> Section:
    """Return the section. where: the file, or how to call the runs; command: the command line that
    made the page."""
    file, records = Path(where), as_csv(evidence.records)
    digest, coded = hashlib.sha256(records).hexdigest(), base64.b64encode(records).decode()
    link = Markup(
        '<a download="{}" href="data:text/csv;base64,{}">{}</a>, {} rows, {} columns, SHA-256 {}'
    ).format(RECORDS, coded, RECORDS, *evidence.records.shape, digest)
    rows: list[list[Cell]] = [
        ["Runs", where],
        ["SHA-256", hash_file(file).sha256 if file.is_file() else "the runs are not one file"],
        ["Records", link],
    ]
    if isinstance(study, StudyFit):
        rows += _of_fit(study, evidence)
    rows += _of_runs(evidence)
    versions = [f"Python {platform.python_version()}"]
    for name in ("forescale", "numpy", "scipy", "pandas"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # run from a checkout that isn't installed
            versions.append(f"{name} unknown")
    rows += [["Made with", ", ".join(versions)], ["Command", code(shlex.join(command))]]
    return Section("provenance", "Where the numbers come from", rows=rows)


def counted(study: StudyFit) -> tuple[str, str, str]:
    """Return how N, C and the loss are counted. The columns of a foreign table count as they
    say."""
    table, p = study.table, study.all_points
    size = "as the table counts" if "parameters" in table else study.job.size.replace("_", " ")
    cost: str = "as the table counts" if "flops" in table else study.job.cost
    is_native = "validation" in table or "loss_definition" in table
    unit = "nats a token" if is_native else "the table's unit"
    cost = "as the law counts" if study.form.PRICED else cost
    return size, "6 N D" if p.flops is None else cost, unit


def _of_fit(study: StudyFit, evidence: StudyEvidence) -> list[list[Cell]]:
    job, (size, cost, unit) = study.job, counted(study)
    chosen = [f"{k} = {v}" for k, v in job.rows.items()]
    chosen += [f"{name} is its {column!r}" for name, column in job.columns.items()]
    aside = len(evidence.records) - len(study.all_points)
    others = f"; {aside} more are sweeps, repeats, or have no loss" if aside > 0 else ""
    rows_of = [["Rows and columns", "; ".join(chosen) or "all, by its own names"]]
    return [
        *(rows_of if not evidence.folder else []),
        ["Fitted to", f"{len(study.points)} of {len(study.all_points)} runs{others}"],
        ["N", size],
        ["C", cost],
        ["D", "tokens of training, repeated ones included" if "steps" in study.table
         else "as the table counts" if "tokens" in study.table else "C / 6 N"],
        *([["Loss", unit]] if "loss_definition" not in evidence.records else []),
        ["Law", study.form.source],
        ["Objective", str(study.fit.objective)],
        ["Resampling", f"{job.bootstraps} fits, of {job.resample} if it applies, seed {job.seed}"],
    ]  # fmt: skip


def _of_runs(evidence: StudyEvidence) -> list[list[Cell]]:
    table, rows = evidence.records, list[list[Cell]]()
    for label, name in _SHARED.items():
        if name in table:
            column = table[name].astype(object).where(table[name].notna(), "not known")
            counts = column.value_counts()
            texts = [f"{value} ({n} runs)" for value, n in counts.items()]
            rest = f" and {len(texts) - _MOST} others" if len(texts) > _MOST else ""
            several = "; ".join(texts[:_MOST]) + rest
            rows.append([label, str(counts.index[0]) if len(counts) == 1 else several])
    if evidence.versions:
        packages = (f"{name} {' and '.join(each)}" for name, each in evidence.versions.items())
        rows.append(["Packages of the runs", ", ".join(packages)])
    if "device_hours" in table and table["device_hours"].notna().all():
        hours = number(float(table["device_hours"].sum()), 4)
        rows.append(["Device-hours", Markup("{} in {} runs").format(hours, len(table))])
    if evidence.times:
        ends = (time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(t)) for t in evidence.times)
        rows.append(["Trained", " to ".join(ends)])
    if evidence.folder:
        text = f"{evidence.folder}: study.yaml, plan.json, events.jsonl, cells, forecasts"
        rows.append(["Study", text])
    return rows
