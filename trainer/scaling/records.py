"""Records: a row a run, with all that a law may be fitted to or sorted by, of our own runs and of
tables from elsewhere.

    a run        its config, its rows and its identity -> every convention of N and of FLOPs, D,
                 losses, hyper-parameters, hashes, seconds
    a table      CSV or parquet, columns named by `columns` -> the same names, as far as it has them

Invariant: derived, never stored; nothing is chosen here that a fit might want otherwise, and what
can't be a record is named with the reason, never dropped in silence. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from models.config import ModelConfig
from models.flops import count, flops_6n, flops_per_token
from trainer.config import TrainJob
from trainer.durable import read_json
from trainer.errors import UserError
from trainer.names import nearest_first
from trainer.run import Run
from trainer.scaling.points import COLUMNS, Points
from trainer.status import Status

SIZES = ("blocks_and_head", "non_embedding", "total")  # conventions of N
EXTRA = ("trunk", "budget", "name")  # of a table, beside the columns of a fit


@dataclass(frozen=True)
class Refused:
    """A run that is no record."""

    name: str
    why: str


def record(run: Run) -> dict[str, Any] | Refused:
    """The row of one run. Losses are held-out, in nats a token of its last whole evaluation; sizes
    in parameters, costs in FLOPs of training, `seconds` on the wall clock of all attempts."""
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
    dataset = read_json(run.identity)["dataset"]
    return {
        "name": run.name,
        **{f"parameters_{n}": getattr(sizes, n) for n in SIZES},
        "flops_causal": last["tokens"] * flops_per_token(job.model, length, causal=True),
        "flops_full": last["tokens"] * flops_per_token(job.model, length),
        "flops_6nd": last["tokens"] * flops_6n(job.model),
        "tokens": last["tokens"],
        "loss": scored["loss"],
        "loss_stderr": scored["loss_stderr"],
        "bits_per_byte": scored["bits_per_byte"],
        "train_loss": last["loss"],
        **_chosen(job),
        "sequence_length": length,
        "vocab_size": dataset["vocab_size"],
        "data": dataset["identity"],
        "validation": f"{scored['windows']} windows of {dataset['identity'][:16]}",
        "trunk": job.run.origin.run or run.name,
        "mfu": last.get("mfu"),
        "seconds": status.goodput.wall,
    }


def _chosen(job: TrainJob) -> dict[str, Any]:
    """Hyper-parameters."""
    sizes = job.model.sizes if isinstance(job.model, ModelConfig) else None
    return {
        "optimizer": job.optimizer.kind,
        "learning_rate": job.optimizer.learning_rate,
        "batch_tokens": job.tokens_per_step,
        "steps": job.total_steps,
        "schedule": job.schedule.kind,
        "warmup_steps": job.steps_of(job.schedule.warmup),
        "seed": job.train.seed,
        "precision": job.precision.kind,
        "width": sizes.width if sizes else None,
        "layers": sizes.num_layers if sizes else None,
    }


def of_runs(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[Refused]]:
    """A row for each run that is a record, and the others with the reason."""
    found = [record(run) for run in runs]
    rows = [row for row in found if not isinstance(row, Refused)]
    return pd.DataFrame(rows), [row for row in found if isinstance(row, Refused)]


def of_table(
    path: Path, columns: Mapping[str, str], rows: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """A table with the columns that `columns` maps ({ours: theirs}) under our names, and those that
    have our names already; only the rows with those words. Raises UserError for a file that can't
    be read, for columns that aren't there, and where no row is left."""
    table = _read(path)
    _must_have(path, table, [*columns.values(), *(rows or {})])
    for column, word in (rows or {}).items():
        words = table[column].astype(str)
        if not (words == word).any():
            near = ", ".join(nearest_first(word, words.unique())[:3])
            raise UserError(str(path), f"no row has {word!r} as its {column}", f"such are: {near}")
        table = table[words == word]
    known = (*COLUMNS, *EXTRA)
    for ours in columns:
        if ours not in known:
            todo = f"the names are {', '.join(known)}"
            raise UserError(f"columns.{ours}", "is no column of a record", todo)
    own = {name: name for name in known if name in table.columns and name not in columns}
    chosen = {**own, **columns}
    if "loss" not in chosen:
        todo = "say which it is, such as columns={loss: final_loss}"
        raise UserError(str(path), "has no column 'loss'", todo)
    return pd.DataFrame({ours: table[theirs] for ours, theirs in chosen.items()})


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "check the path") from None
    except (OSError, ValueError, ImportError) as e:
        what = f"can't be read as a table ({str(e).splitlines()[0]})"
        raise UserError(str(path), what, "give a CSV with a header, or parquet") from None


def _must_have(path: Path, table: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if name not in table.columns:
            near = ", ".join(map(repr, nearest_first(name, map(str, table.columns))[:3]))
            what = f"has no column {name!r}"
            raise UserError(str(path), what, f"the nearest of its {len(table.columns)} are {near}")


def points(table: pd.DataFrame, size: str, cost: str, where: str) -> Points:
    """What a fit reads, of records: N and C by the conventions of our own runs, or those of a table
    as they stand. Raises UserError where runs differ in what a study must hold constant."""
    for name in ("vocab_size", "sequence_length", "validation"):
        if name in table and table[name].nunique() > 1:
            what = f"the runs have {table[name].nunique()} different values of {name}"
            raise UserError(where, what, "fit runs that share it: their losses don't compare")
    sizes = table.get("parameters", table.get(f"parameters_{size}"))
    costs = table.get("flops", table.get(f"flops_{cost}"))
    found = {"parameters": sizes, "flops": costs}
    found |= {name: table.get(name) for name in ("tokens", "unique_tokens")}
    given = {name: column.to_numpy() for name, column in found.items() if column is not None}
    counted = (
        "N " + ("as the table counts" if "parameters" in table else size),
        "C " + ("as the table counts" if "flops" in table else cost),
    )
    return Points(table["loss"].to_numpy(), **given, convention=", ".join(counted), where=where)
