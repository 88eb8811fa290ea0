"""Records: one row per run with everything that a fit or a comparison may use.

    a run        its config, metrics, identity and, if it still exists, its dataset -> every
                 convention of N and of FLOPs, D, losses and their definition, recipe, seeds,
                 hashes, hardware, seconds
    a table      the same names, as far as it has them (tables.py)

Invariant: records are derived, never stored. They contain every convention, so that a fit chooses.
An unknown value is None, never guessed. A run that can't be a record is refused with the reason.
Imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from forescale.config.sections.ramp import length_ramp
from forescale.config.train import TrainJob
from forescale.data.dataset import Dataset
from forescale.ground.errors import UserError
from forescale.ground.storage import hash_file
from forescale.models.config import ModelConfig
from forescale.models.flops import count, expansion, flops_6n, flops_per_token
from forescale.monitor.status import Status
from forescale.resilience.outcome import launch_of
from forescale.run.abilities import column_of
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from forescale.run.stored import StoredSource
from forescale.scaling.fitting.points import COLUMNS, SETTINGS, Array, Points

Convention = Literal["blocks_and_head", "non_embedding", "total", "active"]  # of N
SIZES: tuple[Convention, ...] = get_args(Convention)
COSTS = ("causal", "full", "6nd")  # conventions of C
# Columns that must be equal in all runs of a study: otherwise losses are not comparable.
HELD = ("vocab_size", "sequence_length", "tokenizer", "parametrization", "loss_definition")
# Columns that are equal, beside N and D, in runs that differ by their seed alone.
RECIPE = ("optimizer", "learning_rate", "weight_decay", "batch_tokens", "schedule", "warmup_steps",
          "decay_steps", "precision", "width", "layers", "parametrization", "data",
          "expansion")  # fmt: skip
EXTRA = ("trunk", "budget", "name", "seed", "init_seed", "recipe")  # further columns of a table
OUTCOME = "outcome"  # the column of a task's metric, as links read it: an accuracy, or a loss
PER = 6.0  # FLOPs per parameter and token, of C = 6 N D
_BUDGETS_A_DECADE = 2  # of runs without named budgets, as plan.step has
_N = tuple(f"parameters_{name}" for name in SIZES)
_C = tuple(f"flops_{name}" for name in COSTS)
# Columns of numbers that a fit reads.
NUMERIC = {*COLUMNS, "budget", *_N, *_C}
KNOWN = tuple(dict.fromkeys((*COLUMNS, *EXTRA, *_N, *_C, *HELD, *RECIPE)))


@dataclass(frozen=True)
class Refused:
    """A run that can't be used as a record, and the reason."""

    name: str
    why: str


def record(run: Run) -> dict[str, Any] | Refused:
    """Return the record of a run, or the refusal.

    Losses are held-out, in nats per token, of the last complete evaluation, with standard errors
    over its windows (sequences); abilities are named as in the rows (`ability/copy/4`). Sizes are
    in parameters, costs in FLOPs of training.
    `parameters_active` are all parameters but the experts that a token does not use, and what
    predicts later tokens, which costs of training include; 6N counts the blocks and head among
    them. `expansion` is flops.expansion: 1 without experts. `seconds` are
    wall-clock time over all attempts, waits between them included; `train_seconds` those of its
    tokens at the pace of the median step; `device_hours` are the hours of
    each launch times its ranks; `mfu` is that of the median step. A branch has its own seconds, but
    its tokens include the trunk's.
    """
    status = Status(run)
    job, model = status.job, status.job.model
    if why := _why_not(status):
        return Refused(run.name, why)
    assert isinstance(model, ModelConfig)  # others are refused
    sizes, last, state = count(model), status.train[-1], status.checkpoints[-1].state
    identity = run.read_identity()
    dataset, versions = identity["dataset"], identity.get("versions", {})
    rates = [row["mfu"] for row in status.train if row.get("mfu")]
    paces = [row["tokens_per_second"] for row in status.train if row.get("tokens_per_second")]
    init_seed = job.train.init_seed
    return {
        "name": run.name,
        "folder": str(run.path),
        **{f"parameters_{n}": getattr(sizes, n) for n in SIZES},
        "flops_causal": last["tokens"] * _flops(job, last["step"], causal=True),
        "flops_full": last["tokens"] * _flops(job, last["step"], causal=False),
        "flops_6nd": last["tokens"] * flops_6n(model),
        "tokens": last["tokens"],
        **_read(status, dataset["sources"]),
        **_losses(status, dataset),
        "train_loss": last["loss"],
        "optimizer": job.optimizer.kind,
        "learning_rate": job.optimizer.learning_rate,
        "table_learning_rate": job.optimizer.table_learning_rate or job.optimizer.rate_of_the_rest,
        "scalar_learning_rate": job.optimizer.scalar_learning_rate
        or job.optimizer.rate_of_the_rest,
        "weight_decay": job.optimizer.weight_decay,
        "batch_tokens": job.tokens_per_step,
        "steps": job.total_steps,
        "schedule": job.schedule.kind,
        "warmup_steps": job.warmup_steps,
        "decay_steps": job.decay_steps,
        "seed": job.train.seed,  # of the data order; init_seed: of the weights
        "init_seed": job.train.seed if init_seed is None else init_seed,
        "precision": job.precision.label,
        "parametrization": model.parametrization.kind,
        "width": model.sizes.width,
        "layers": model.sizes.num_layers,
        "expansion": expansion(model),
        "sequence_length": job.train.sequence_length,
        "vocab_size": dataset["vocab_size"],
        "tokenizer": hash_file(run.tokenizer).sha256 if run.tokenizer.is_file() else None,
        "data": dataset["identity"],
        "corpus": dataset.get("corpus_hash"),
        "trunk": job.run.origin.run or run.name,
        "code_version": None if (v := versions.get("forescale")) == "unknown" else v,
        "torch_version": versions.get("torch"),
        "device": state.get("numerics", {}).get("device"),
        "threads": state.get("numerics", {}).get("threads"),
        "world_size": state["world_size"],
        "mfu": float(np.median(rates)) if rates else None,
        "seconds": status.goodput.wall,
        "train_seconds": last["tokens"] / float(np.median(paces)) if paces else None,
        "device_hours": device_hours_of(status),
    }


def _why_not(status: Status) -> str | None:
    """Return why a run can't be a record; None if it can."""
    job, scored = status.job, status.validation
    if status.state != "complete":
        if status.step >= job.total_steps and (scored is None or scored["step"] != status.step):
            return "its last step was not evaluated"
        return f"{status.state} at step {status.step:,} of {job.total_steps:,}"
    if not isinstance(job.model, ModelConfig):
        return "its model is a custom class of unknown size"
    if not job.objective.is_next_token:
        return f"its objective {job.objective.kind} has other targets than each next token"
    if scored is None or not scored["loss"] < float("inf"):
        return "it diverged: its loss is not finite"
    return None


def _losses(status: Status, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the losses and abilities of the last evaluation, and how its losses are defined."""
    job, scored, by_source = status.job, status.validation, []
    assert scored is not None  # others are refused
    if len(dataset["sources"]) > 1:
        scores = read_rows(status.run.metrics, kind="validation", step=status.step)
        by_source = [(r["dataset"], r) for r in scores if r["dataset"] != "validation"]
    targets = f"the {scored['targets']} targets" if "targets" in scored else "the targets"
    within = "inside documents" if job.data.document_mask else "across documents"
    return {
        **{name: scored[name] for name in ("loss", "loss_stderr", "bits_per_byte")},
        **{name: x for name, x in scored.items() if column_of(name)},
        **{f"loss_{name}": row["loss"] for name, row in by_source},
        **{f"loss_{name}_stderr": row["loss_stderr"] for name, row in by_source},
        **_shares(job, dataset["sources"]),
        "loss_definition": (  # losses are comparable if it is equal
            f"held-out cross-entropy, nats per token, mean over {targets}, ends of text included, "
            f"of {scored['windows']} windows of {job.train.sequence_length} tokens of the "
            f"validation split of dataset {dataset['identity'][:16]}, attention {within}"
        ),
    }


def _shares(job: TrainJob, sources: Mapping[str, StoredSource]) -> dict[str, float | None]:
    """Return the share of each source of a mixture in the tokens; None if it changed in the run."""
    weights, total = job.data.weights, sum(job.data.weights.values())
    if len(sources) < 2 or not total:
        return {}
    return {f"share_{n}": None if job.data.stages else weights.get(n, 0) / total for n in sources}


def _flops(job: TrainJob, steps: int, causal: bool) -> float:
    """Return the FLOPs of a token, on average over the first `steps` steps."""
    assert isinstance(job.model, ModelConfig)
    shares = length_ramp(job).shares(steps, job.batch_ramp.samples)
    return sum(share * flops_per_token(job.model, length, causal) for length, share in shares)


def _read(status: Status, sources: Mapping[str, StoredSource]) -> dict[str, Any]:
    """Return what a run has read of its data.

    unique_tokens: distinct targets; epochs: of the source that was repeated most; bytes: of UTF-8,
    by the mean bytes per token of the training split; validation_hash: of the held-out split alone.
    A value is None if the dataset is gone, was replaced, or is remote (nothing is downloaded for a
    record); unique_tokens and epochs also if the packing is not in windows.
    """
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
    tokens = {name: status.tokens for name in datasets}
    if len(datasets) > 1:
        tokens = {name: sum(row["shares"][name] for row in status.train) for name in datasets}
    if sum(tokens.values()) != status.tokens:  # a branch of a mixture: its metrics lack the trunk
        return known
    splits = {name: dataset.split("train") for name, dataset in datasets.items()}
    known["bytes"] = round(sum(tokens[n] * s.num_bytes / s.num_tokens for n, s in splits.items()))
    if status.job.data.packing != "windows":
        return known
    once = {name: sum(n - 1 for n in split.shard_tokens) for name, split in splits.items()}
    known["unique_tokens"] = sum(min(tokens[name], once[name]) for name in once)
    known["epochs"] = max(tokens[name] / once[name] for name in once)
    return known


def _opened(stored: StoredSource) -> Dataset | None:
    """Return the dataset if it is the one that the run was trained on, else None."""
    if "://" in stored["path"]:
        return None
    try:
        dataset = Dataset(Path(stored["path"]))
    except UserError:
        return None
    return dataset if dataset.identity == stored["identity"] else None


def device_hours_of(status: Status) -> float | None:
    """Return device hours over all launches, or None if a launch's number of ranks is unknown."""
    saved = {c.attempt: c.state["world_size"] for c in status.checkpoints}
    hours = 0.0
    for launch in status.goodput.launches:
        known = launch_of(launch.attempts[0].path).get("processes")
        ranks = known or next((saved[a.number] for a in launch.attempts if a.number in saved), None)
        if ranks is None:
            return None
        hours += launch.length * ranks / 3600
    return hours


def of_runs(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[Refused]]:
    """Return the records of runs, and the refusals."""
    records = [record(run) for run in runs]
    rows = [row for row in records if not isinstance(row, Refused)]
    return pd.DataFrame(rows), [row for row in records if isinstance(row, Refused)]


def points(table: pd.DataFrame, size: str, cost: str, where: str) -> Points:
    """Return the points of records for a fit.

    size, cost: conventions of N and C; a table that has plain `parameters` or `flops` keeps those.
    A table with both and without tokens gets D = C / 6N. Raises UserError if the runs differ in a
    column that must be equal (HELD).
    """
    free = ("vocab_size", "tokenizer") if "vocabulary" in table else ()  # by a normalised loss
    mixed = [(name, table[name].nunique()) for name in HELD if name in table and name not in free]
    if different := [f"{n} different values of {name}" for name, n in mixed if n > 1]:
        problem = f"losses are not comparable: the runs have {' and '.join(different)}"
        raise UserError(where, problem, "fit only runs that share them")
    sizes = table.get("parameters", table.get(f"parameters_{size}"))
    costs = table.get("flops", table.get(f"flops_{cost}"))
    tokens = table.get("tokens")
    if tokens is None and sizes is not None and "flops" in table:
        tokens = table["flops"] / PER / sizes
    columns = {"parameters": sizes, "flops": costs, "tokens": tokens}
    for name in ("unique_tokens", *SETTINGS):
        column = table.get(name)
        columns[name] = None if column is None or column.isna().any() else column
    arrays = {name: column.to_numpy() for name, column in columns.items() if column is not None}
    counts = (
        "N " + ("as the table counts" if "parameters" in table else size),
        "C " + ("as the table counts" if "flops" in table else cost),
    )
    return Points(table["loss"].to_numpy(), **arrays, convention=", ".join(counts), where=where)


def budgets_of(table: pd.DataFrame, flops: Array) -> Array:
    """Return the budget of each run, (n,): that of the table, or half a decade of C.

    Ladders of sizes and tokens have no two runs of one C, so their budgets are made by rounding.
    """
    if "budget" in table:
        return table["budget"].to_numpy(dtype=float)
    return 10 ** (np.round(np.log10(flops) * _BUDGETS_A_DECADE) / _BUDGETS_A_DECADE)
