"""Averages the weights of several checkpoints of a run, as a new run that others begin with.

With a constant learning rate the mean of late checkpoints is often better than the last one, as
after a decay (LAWA: Kaddour 2022, arXiv 2209.14981; SWA: Hägele et al. 2024, arXiv 2405.18392).

Invariant: the new run appears complete, by one rename, or not at all. Each weight is the mean of
the fp32 weights, summed in fp64 and rounded once; of one checkpoint it is that weight, bit for bit.
Adapters are merged first, as the mean of products isn't the product of means. One tensor is in
memory at a time, in fp64, beside the fp32 one that is added to it.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from forescale.checkpoint.choice import open_readable, verified
from forescale.checkpoint.reader import Checkpoint
from forescale.checkpoint.writer import unread_weight, write_weights
from forescale.config.frozen import frozen_file, thaw
from forescale.config.train import TrainJob
from forescale.engine.portable.fragments import WEIGHT, Fragment
from forescale.ground.console import Meter, Progress, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import (
    TABLE,
    hash_file,
    read_table,
    read_typed,
    write_checked_json,
    write_file,
)
from forescale.run.directory import Run, expect_free, new_run
from forescale.run.identity import code_and_id
from forescale.run.start import versions

MOST = 5  # checkpoints that are averaged by default; LAWA took 6


@dataclass(frozen=True)
class Averaged:
    """A run that holds averaged weights. steps: of the checkpoints, ascending; parameters: their
    number; bytes: of the weights; copied: names of the whole numbers, such as the steps of the bias
    of experts, which are no means but copied from the last checkpoint."""

    run: Run
    steps: list[int]
    parameters: int
    bytes: int
    copied: list[str]


def chosen_steps(run: Run, last: int | None = None, steps: Sequence[int] = ()) -> list[int]:
    """Return the steps of the checkpoints to average, ascending: `steps`, or the `last` ones of the
    run's history; without either the last MOST, or all if there are fewer, but at least two.

    Raises UserError if the run doesn't have them.
    """
    if steps:
        known = run.checkpoint_steps()
        for step in steps:
            if step not in known:
                problem, todo = "no such checkpoint", f"choose of these steps: {_listed(known)}"
                raise UserError(str(run.checkpoint_path(step)), problem, todo)
        if len(set(steps)) < len(steps):
            raise UserError("steps", f"{_listed(steps)} has a step twice", "name each once")
        return sorted(steps)
    known = []
    for step in run.checkpoint_steps():  # without those before which a later attempt started
        checkpoint = open_readable(run.checkpoint_path(step))  # a damaged one is reported later
        if checkpoint is None or run.is_eligible(checkpoint.attempt, step):
            known.append(step)
    chosen = known[-(last or MOST) :]
    todo_more = "keep more with checkpoint.keep"
    if not chosen:
        todo = f"train it: forescale train run.name={run.name}"
        raise UserError(str(run.path), "this run has no checkpoint yet", todo)
    if last is not None and len(chosen) < last:
        problem = f"is {last:,}, and {run.path} has checkpoints at steps {_listed(known)} alone"
        raise UserError("last", problem, f"write last={len(chosen)}, or {todo_more}")
    if last is None and len(chosen) == 1:
        problem = f"has one checkpoint, of step {chosen[0]:,}, and an average needs two"
        raise UserError(
            str(run.path), problem, f"{todo_more}, or write last=1 for its weights alone"
        )
    return chosen


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def average(origin: Run, steps: Sequence[int], run: Run, progress: Progress = silent) -> Averaged:
    """Make `run` with the mean of the weights of `origin` at `steps`, and return a description of
    it.

    It has the config, data and tokenizer of `origin`. Every byte of the checkpoints is verified
    first. Raises UserError if `run` exists, or if a checkpoint can't be read.
    """
    expect_free(run)
    job = thaw(TrainJob, origin.config, trust=True)  # read, not run: nothing of it is imported
    job = replace(job, run=replace(job.run, name=run.name, root=str(run.path.parent)))
    tokenizer = origin.verified_tokenizer().read_bytes()
    checkpoints = _opened(origin, steps, progress)
    parts, copied = _parts(checkpoints)
    means = [part for part in parts if part.name not in copied]
    numbers = sum(part.data.numel() for part in means)
    averaged = Averaged(run, [*steps], numbers, sum(part.data.nbytes for part in parts), copied)
    source = _source(origin, checkpoints, copied)
    meter = Meter(progress, "average weights", averaged.bytes, "bytes")
    with new_run(run, job.run.mode) as new:
        write_weights(new, parts, lambda size: meter(size, 0))
        write_file(new.tokenizer, tokenizer)
        for name in ("chat", "references", "imported"):  # the other files that verbs read
            old = getattr(origin, name)
            if old.is_file():
                read_typed(origin.small_files[old], old)  # raises UserError if it was changed
                write_file(getattr(new, name), old.read_bytes())
        write_checked_json(new.averaged, source)
        identity = {
            "name": run.name,
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
            "dataset": origin.read_identity()["dataset"],
            "versions": versions(),
            **code_and_id(),
            "parameters": numbers,
        }
        write_checked_json(new.identity, identity)
        write_file(new.config, frozen_file(job))  # the last: with it a directory is a run
    meter.end()
    return averaged


def _opened(run: Run, steps: Sequence[int], progress: Progress) -> list[Checkpoint]:
    """Return the checkpoints, every byte verified. Raises UserError if one is damaged, or of
    another model than the last."""
    paths, lock = [run.checkpoint_path(step) for step in steps], Lock()
    size = sum(entry.size for path in paths for entry in read_table(path).values())
    meter = Meter(progress, "verify checkpoints", size, "bytes")

    def tick(read: int) -> None:  # files are hashed by several threads
        with lock:
            meter(read, 0)

    checkpoints = [verified(path, tick=tick) for path in paths]
    meter.end()
    for checkpoint in checkpoints:
        checkpoint.expect_shapes(checkpoints[-1].weights().shapes, merged=True)
    return checkpoints


def _parts(checkpoints: Sequence[Checkpoint]) -> tuple[list[Fragment], list[str]]:
    """Return the averaged tensors, each computed when it is written, and the names of those that
    are copied from the last checkpoint."""
    last, parts, copied = checkpoints[-1], [], []
    for name, shape in last.weights().shapes.items():
        dtype, read = last.reader.dtype(name, WEIGHT), partial(_mean, checkpoints, name)
        if dtype.is_floating_point:
            dtype = torch.float32
        else:  # no mean of whole numbers
            copied.append(name)
            read = partial(_as_stored, last, name, dtype)
        described = torch.empty(math.prod(shape), dtype=dtype, device="meta")
        parts.append(unread_weight(name, shape, 0, described, read))
    return parts, copied


def _mean(checkpoints: Sequence[Checkpoint], name: str) -> Tensor:
    with _still_there(checkpoints[0]):
        total = checkpoints[0].merged(name).double()
    for checkpoint in checkpoints[1:]:
        with _still_there(checkpoint):
            total += checkpoint.merged(name)
    return total.div_(len(checkpoints)).float()


def _as_stored(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(checkpoint.shapes[name], dtype=dtype)
    with _still_there(checkpoint):
        checkpoint.reader.read_into(name, WEIGHT, 0, tensor.view(-1))
    return tensor


@contextmanager
def _still_there(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise UserError if the checkpoint is deleted before all of it is read: a run that trains on
    deletes its old ones."""
    try:
        yield
    except FileNotFoundError:
        run = checkpoint.path.parents[1]
        todo = f"keep it first: forescale pin {run} step={checkpoint.position.step}; or name others"
        raise UserError(str(checkpoint.path), "was deleted meanwhile", todo) from None


def _source(origin: Run, checkpoints: Sequence[Checkpoint], copied: list[str]) -> dict[str, Any]:
    """Return the content of averaged.json. table: the sha256 of the checkpoint's files.json, which
    has those of all its files."""
    rows = []
    for checkpoint in checkpoints:
        with _still_there(checkpoint):
            table = hash_file(checkpoint.path / TABLE).sha256
        step = checkpoint.position.step
        rows.append({"step": step, "attempt": checkpoint.attempt, "table": table})
    wandb_id = origin.read_identity().get("wandb_id")  # an early version wrote none
    run = str(origin.path.resolve())
    return {"run": run, "wandb_id": wandb_id, "checkpoints": rows, "kept": copied}
