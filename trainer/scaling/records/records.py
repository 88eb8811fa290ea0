"""Records: a row a run, with all that a law may be fitted to or sorted by, of our own runs and of
tables from elsewhere.

    a run        its config, its rows, its identity and its dataset, where that is still there ->
                 every convention of N and of FLOPs, D, losses and what they are means of, recipe,
                 seeds, hashes, hardware, seconds
    a table      CSV, parquet, JSON or an export (imports.py), columns named by `columns` -> the
                 same names, as far as it has them

Invariant: derived, never stored; nothing is chosen here that a fit might want otherwise; what can't
be known is None, never guessed; what can't be a record is named with the reason. Imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forescale.config.suggest import nearest_first
from forescale.config.train import TrainJob
from forescale.data.dataset import Dataset
from forescale.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.flops import count, flops_6n, flops_per_token
from forescale.monitor.status import Status
from forescale.resilience.outcome import launch_of
from forescale.run.directory import Run, read_rows
from forescale.scaling.fitting.points import COLUMNS, Points
from forescale.scaling.records.exports import Export, Refused, read_export
from forescale.storage import hash_file, read_json

__all__ = ["Refused"]

SIZES = ("blocks_and_head", "non_embedding", "total")  # conventions of N
COSTS = ("causal", "full", "6nd")  # of C
# What a study must hold constant: losses don't compare across it.
HELD = ("vocab_size", "sequence_length", "tokenizer", "parametrization", "loss_definition")
# What runs share that differ by their seed alone, beside N and D.
RECIPE = ("optimizer", "learning_rate", "weight_decay", "batch_tokens", "schedule", "warmup_steps",
          "decay_steps", "precision", "width", "layers", "parametrization", "data")  # fmt: skip
EXTRA = ("trunk", "budget", "name", "seed", "init_seed")  # of a table, beside the columns of a fit
_N = tuple(f"parameters_{name}" for name in (*SIZES, "active"))
_C = tuple(f"flops_{name}" for name in COSTS)
KNOWN = tuple(dict.fromkeys((*COLUMNS, *EXTRA, *_N, *_C, *HELD, *RECIPE)))


def record(run: Run) -> dict[str, Any] | Refused:
    """The row of one run. Losses are held-out, in nats a token of its last whole evaluation, with
    standard errors over its windows, which are the sequences; sizes in parameters, costs in FLOPs
    of training. `parameters_active` are those that a token is multiplied with or added to: all of
    them, for no model here routes tokens past a part of itself. `seconds` are on the wall clock of
    all attempts, waits between them included; `device_hours` are the hours of each launch times its
    ranks; `mfu` is that of the median step. A branch has its own seconds, and its trunk's tokens.
    """
    status = Status(run)
    job = status.job
    if status.state != "complete":
        return Refused(run.name, f"{status.state} at step {status.step:,} of {job.total_steps:,}")
    if not isinstance(job.model, ModelConfig):
        return Refused(run.name, "its model is a class of the user's own, of unknown size")
    scored = status.validation
    if scored is None or scored["step"] != status.step:
        return Refused(run.name, "its last step was not evaluated")
    if not scored["loss"] < float("inf"):
        return Refused(run.name, "it diverged: its loss is no number")
    last, sizes, length = status.train[-1], count(job.model), job.train.sequence_length
    identity = read_json(run.identity)
    dataset = identity["dataset"]
    return {
        "name": run.name,
        **{f"parameters_{n}": getattr(sizes, n) for n in SIZES},
        "parameters_active": sizes.total,
        "flops_causal": last["tokens"] * flops_per_token(job.model, length, causal=True),
        "flops_full": last["tokens"] * flops_per_token(job.model, length),
        "flops_6nd": last["tokens"] * flops_6n(job.model),
        "tokens": last["tokens"],
        **_read(status, dataset["sources"]),
        "loss": scored["loss"],
        "loss_stderr": scored["loss_stderr"],
        "bits_per_byte": scored["bits_per_byte"],
        **(_by_source(run, status.step) if len(dataset["sources"]) > 1 else {}),
        "loss_definition": _definition(job, scored, dataset["identity"]),
        "train_loss": last["loss"],
        **_chosen(job, job.model),
        "sequence_length": length,
        "vocab_size": dataset["vocab_size"],
        "tokenizer": hash_file(run.tokenizer).sha256 if run.tokenizer.is_file() else None,
        "data": dataset["identity"],
        "corpus": dataset.get("corpus_hash"),
        "trunk": job.run.origin.run or run.name,
        **_made_by(status, identity.get("versions", {})),
    }


def _definition(job: TrainJob, scored: Mapping[str, Any], data: str) -> str:
    """What a loss is the mean of, in words: two losses compare where these are the same."""
    targets = f"the {scored['targets']} targets" if "targets" in scored else "the targets"
    within = "inside documents" if job.data.document_mask else "across documents"
    return (
        f"held-out cross-entropy, nats a token, mean over {targets}, ends of text among them, of "
        f"{scored['windows']} windows of {job.train.sequence_length} tokens of the validation "
        f"split of dataset {data[:16]}, attention {within}"
    )


def _by_source(run: Run, step: int) -> dict[str, float]:
    """Held-out losses of each source of a mixture."""
    rows = [r for r in read_rows(run.metrics) if r["kind"] == "validation" and r["step"] == step]
    found = {r["dataset"]: r for r in rows if r["dataset"] != "validation"}
    losses = {f"loss_{name}": row["loss"] for name, row in found.items()}
    return losses | {f"loss_{name}_stderr": row["loss_stderr"] for name, row in found.items()}


def _chosen(job: TrainJob, model: ModelConfig) -> dict[str, Any]:
    """Hyper-parameters and seeds: `seed` of the order of data, `init_seed` of the weights."""
    sizes = model.sizes
    init_seed = job.train.init_seed
    decay = job.schedule.decay
    return {
        "optimizer": job.optimizer.kind,
        "learning_rate": job.optimizer.learning_rate,
        "weight_decay": job.optimizer.weight_decay,
        "batch_tokens": job.tokens_per_step,
        "steps": job.total_steps,
        "schedule": job.schedule.kind,
        "warmup_steps": job.steps_of(job.schedule.warmup),
        "decay_steps": job.steps_of(decay) if decay else 0,
        "seed": job.train.seed,
        "init_seed": job.train.seed if init_seed is None else init_seed,
        "precision": job.precision.kind,
        "parametrization": model.parametrization,
        "width": sizes.width,
        "layers": sizes.num_layers,
    }


def _read(status: Status, sources: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What of its data a run has read. unique_tokens: targets that differ; epochs: of the source
    that was read most often; bytes: UTF-8, at the mean of the training split's tokens;
    validation_hash: of the held-out split alone. None where the dataset is gone or is another one
    now, is remote (nothing is fetched for a record), or is packed otherwise than in windows."""
    unknown = dict.fromkeys(("unique_tokens", "epochs", "bytes", "validation_hash"))
    opened = {name: _opened(stored) for name, stored in sources.items()}
    datasets = {name: dataset for name, dataset in opened.items() if dataset}
    if len(datasets) < len(sources):
        return unknown
    held_out = [
        [d.manifest["dtype"], d.manifest["tokenizer"]["sha256"], name]
        + [[s["tokens"], s["sha256"] or s["content"]] for s in d.manifest["splits"][name]["shards"]]
        for d in datasets.values()
        for name in d.manifest["splits"]
        if name == "validation"
    ]
    digest = hashlib.sha256(json.dumps(held_out).encode()).hexdigest()
    known = unknown | {"validation_hash": digest}
    seen = {name: status.tokens for name in datasets}
    if len(datasets) > 1:
        seen = {name: sum(row["shares"][name] for row in status.train) for name in datasets}
    if sum(seen.values()) != status.tokens:  # a branch of a mixture: the rows are not all of it
        return known
    splits = {name: dataset.split("train") for name, dataset in datasets.items()}
    known["bytes"] = round(sum(seen[n] * s.num_bytes / s.num_tokens for n, s in splits.items()))
    if status.job.data.packing != "windows":
        return known
    once = {name: sum(n - 1 for n in split.shard_tokens) for name, split in splits.items()}
    known["unique_tokens"] = sum(min(seen[name], once[name]) for name in once)
    known["epochs"] = max(seen[name] / once[name] for name in once)
    return known


def _opened(stored: Mapping[str, str]) -> Dataset | None:
    """The dataset, if it is the one that the run was trained on."""
    if "://" in stored["path"]:
        return None
    try:
        found = Dataset(Path(stored["path"]))
    except UserError:
        return None
    return found if found.identity == stored["identity"] else None


def _made_by(status: Status, versions: Mapping[str, str]) -> dict[str, Any]:
    """Code, hardware and time."""
    state = status.checkpoints[-1].state
    rates = [row["mfu"] for row in status.train if row.get("mfu")]
    return {
        "code_version": None if (v := versions.get("forescale")) == "unknown" else v,
        "torch_version": versions.get("torch"),
        "device": state.get("numerics", {}).get("device"),
        "world_size": state["world_size"],
        "mfu": float(np.median(rates)) if rates else None,
        "seconds": status.goodput.wall,
        "device_hours": device_hours_of(status),
    }


def device_hours_of(status: Status) -> float | None:
    """None where a launch left no word of how many ranks it had."""
    saved = {c.attempt: c.state["world_size"] for c in status.checkpoints}
    hours = 0.0
    for launch in status.goodput.launches:
        told = launch_of(launch.attempts[0].path).get("processes")
        ranks = told or next((saved[a.number] for a in launch.attempts if a.number in saved), None)
        if ranks is None:
            return None
        hours += (launch.ended - launch.begun) * ranks / 3600
    return hours


def of_runs(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[Refused]]:
    """A row for each run that is a record, and the others with the reason."""
    found = [record(run) for run in runs]
    rows = [row for row in found if not isinstance(row, Refused)]
    return pd.DataFrame(rows), [row for row in found if isinstance(row, Refused)]


def of_table(
    path: Path, columns: Mapping[str, str], rows: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """As `of_export`, without those that were refused."""
    return of_export(path, columns, rows)[0]


def of_export(
    path: Path, columns: Mapping[str, str], rows: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, list[Refused]]:
    """A table with the columns that `columns` maps ({ours: theirs}) under our names, and those that
    have our names already; only the rows with those words. Of an export (imports.py) the runs that
    haven't finished, or lack a column that is mapped, are refused. Raises UserError for a file that
    can't be read, for columns that aren't there, and where no row is left."""
    export = _only(path, read_export(path), rows or {})
    table = export.table
    _must_have(path, table, [*columns.values()])
    for ours in columns:
        if ours not in KNOWN:
            todo = f"the names are {', '.join(KNOWN)}"
            raise UserError(f"columns.{ours}", "is no column of a record", todo)
    own = {name: name for name in KNOWN if name in table.columns and name not in columns}
    named = {} if "name" in own or "name" in columns or not export.name else {"name": export.name}
    chosen = {**named, **own, **columns}
    if "loss" not in chosen:
        near = ", ".join(map(repr, nearest_first("loss", map(str, table.columns))[:3]))
        todo = f"say which it is, such as columns={{loss: final_loss}}; the nearest are {near}"
        raise UserError(str(path), "has no column 'loss'", todo)
    refused = export.refused([theirs for ours, theirs in columns.items() if ours in COLUMNS])
    kept = table[~table.index.isin(refused)]
    if kept.empty:
        what = f"none of its {len(table)} runs has finished with {', '.join(chosen)}"
        raise UserError(str(path), what, f"the first: {next(iter(refused.values())).why}")
    return pd.DataFrame({o: kept[t] for o, t in chosen.items()}), list(refused.values())


def _only(path: Path, export: Export, rows: Mapping[str, str]) -> Export:
    """Those with the words."""
    table = export.table
    _must_have(path, table, [*rows])
    for column, word in rows.items():
        words = table[column].astype(str)
        if not (words == word).any():
            near = ", ".join(nearest_first(word, words.unique())[:3])
            raise UserError(str(path), f"no row has {word!r} as its {column}", f"such are: {near}")
        table = table[words == word]
    return export.of(table)


def _must_have(path: Path, table: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if name not in table.columns:
            near = ", ".join(map(repr, nearest_first(name, map(str, table.columns))[:3]))
            what = f"has no column {name!r}"
            raise UserError(str(path), what, f"the nearest of its {len(table.columns)} are {near}")


def points(table: pd.DataFrame, size: str, cost: str, where: str) -> Points:
    """What a fit reads, of records: N and C by the conventions of our own runs, or those of a table
    as they stand. Raises UserError where runs differ in what a study must hold constant."""
    mixed = [(name, table[name].nunique()) for name in HELD if name in table]
    if found := [f"{n} different values of {name}" for name, n in mixed if n > 1]:
        what = f"the runs have {' and '.join(found)}"
        raise UserError(where, what, "fit runs that share it: their losses don't compare")
    sizes = table.get("parameters", table.get(f"parameters_{size}"))
    costs = table.get("flops", table.get(f"flops_{cost}"))
    columns = {"parameters": sizes, "flops": costs, "tokens": table.get("tokens")}
    unique = table.get("unique_tokens")
    columns["unique_tokens"] = None if unique is None or unique.isna().any() else unique
    given = {name: column.to_numpy() for name, column in columns.items() if column is not None}
    counted = (
        "N " + ("as the table counts" if "parameters" in table else size),
        "C " + ("as the table counts" if "flops" in table else cost),
    )
    return Points(table["loss"].to_numpy(), **given, convention=", ".join(counted), where=where)
