"""Turns a job into a run directory: resolves values from the data, and freezes the config or
compares it with the frozen one.

Invariant: from its first step on, a run directory belongs to one frozen config and one dataset.
Changes of the trajectory are refused with the list; all other changes are frozen before ranks
start. (Ranks write an event for each change that ends bit-exactness.) Until the first step, a
corrected command replaces the config. Imports no torch, so that a refusal comes in a second.
"""

import hashlib
import itertools
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from forescale.config.frozen import Change, diff, frozen_file, may_resume, thaw
from forescale.config.hardware import exactness
from forescale.config.layers import LENGTHS
from forescale.config.schema import TargetConfig, leaves, plain
from forescale.config.sections.data import ONLY, CorpusConfig, DataConfig
from forescale.config.target import is_any_class
from forescale.config.train import TrainJob
from forescale.data.dataset import Dataset, Sources
from forescale.data.prepare.corpus import VOCABULARY, prepare_embedded
from forescale.ground.console import progress_display
from forescale.ground.errors import UserError
from forescale.ground.foreign import read_object
from forescale.ground.storage import write_checked_json, write_file
from forescale.models.config import ModelConfig
from forescale.run.abilities import prompts_of_job, questions_of_job
from forescale.run.branch import NewestStep, check_origin, data_of, origin_of, with_step
from forescale.run.directory import Run, new_run
from forescale.run.feed import feed_of, resolved_model, whole_rows_of
from forescale.run.forecast import prediction_interval_of
from forescale.run.identity import code_and_id, data_fields
from forescale.run.rows import each_row
from forescale.run.special_tokens import with_special_tokens

Examine = Callable[[TrainJob, Sources], None]
PACKAGES = ("forescale", "torch", "deepspeed", "accelerate", "numpy", "tokenizers")


@dataclass(frozen=True)
class Start:
    """A run that is ready to be trained, its frozen job and its opened data. notes: sentences for
    the user about the start."""

    run: Run
    job: TrainJob
    sources: Sources
    notes: tuple[str, ...] = ()


def start(job: TrainJob, examine: Examine | None = None, newest: NewestStep | None = None) -> Start:
    """Prepare the data, then open or make the run directory of `job`: once a command, before there
    are ranks, or on rank 0 alone. examine: raises UserError if the job's own classes don't work,
    before the config of a run without a step is written. newest: see branch.with_step. Raises
    UserError if the directory belongs to another config or dataset, or another command makes it at
    the same moment."""
    run = Run(job.run.directory)
    expect_trainable(run)
    _check_resume(job, run)
    sources = open_sources(job.data)
    job = settle(job, sources)
    feed_of(job, sources)  # errors of the mixture are reported before anything is written
    whole_rows_of(job, sources, "validation")  # the same of their tables
    questions_of_job(job, sources)
    prompts_of_job(job, sources)
    prediction_interval_of(job)
    # Compared, not run: the typed job is.
    old = thaw(TrainJob, run.config, trust=True) if run.config.exists() else None
    job = with_step(job, old, newest)
    if old is not None and has_stepped(run):
        _check_data(run, sources)
        if changes := _allowed(run, old, job):
            _freeze(run, job, [change.key for change in changes])
        return Start(run, job, sources)
    check_origin(job, sources)
    if examine is not None:
        examine(job, sources)
    if old is None:
        identity = {"name": run.name, **_of_data(sources), "versions": versions(), **code_and_id()}
        with new_run(run, job.run.mode) as new:
            write_file(new.tokenizer, sources.first.tokenizer_json)
            _keep(new, job, sources)
            write_checked_json(new.identity, identity)
            write_file(new.config, frozen_file(job))
        return Start(run, job, sources)
    return Start(run, job, sources, _correct(run, old, job, sources))


def reopen(job: TrainJob) -> Start:
    """Return the run of a job that `start` has returned in another process: what a rank needs. The
    data is opened; nothing is written, because another launch may have changed the config
    meanwhile. job: the frozen config, or the command that rank 0 has too. Raises UserError if the
    command or its data differ from the run's."""
    run, sources = Run(job.run.directory), open_sources(job.data)
    frozen = thaw(TrainJob, run.config, trust=True)  # compared, not run
    job = with_step(settle(job, sources), frozen, None)
    _check_data(run, sources)
    _allowed(run, frozen, job)
    return Start(run, job, sources)


def expect_trainable(run: Run) -> None:
    """Raise UserError if a run holds weights alone: other runs begin with them, and none trains
    them."""
    if how := run.weights_alone:
        branch = f"run.name=NEW run.from.run={run.path} run.from.load=weights"
        branch += " data.path=DIR" if how == "imported" else ""
        problem = f"holds {how} weights, which no training changes"
        raise UserError(str(run.path), problem, f"begin a run with them: forescale train {branch}")


def has_stepped(run: Run) -> bool:
    """Return True if an attempt of the run has made a step, or if its files can't tell any more."""
    attempts = run.attempts()
    if run.checkpoint_steps() or run.read_events(kind="checkpoint_saved"):
        return True
    if run.has_links and not any(a.has_begun for a in attempts):
        return True  # attempts were deleted
    files = (attempt.metrics.path for attempt in attempts)
    return any(row.get("kind") == "train" for path in files for row, _ in each_row(path))


def check_changes(job: TrainJob) -> None:
    """Raise UserError if `start` would refuse run.resume of a job, as `settle` returns it, or the
    changes of its run's config."""
    run = Run(job.run.directory)
    _check_resume(job, run)
    if run.config.exists() and has_stepped(run):
        old = thaw(TrainJob, run.config, trust=True)
        _allowed(run, old, with_step(job, old, None))


def _allowed(run: Run, old: TrainJob, job: TrainJob) -> list[Change]:
    """Return the changes of a run's config. Raises UserError if one is refused."""
    refusals, *taken = may_resume(old, job, max(run.checkpoint_steps(), default=0))
    if not refusals:
        return [*itertools.chain(*taken)]
    problem = "the run was started with another config: " + "; ".join(map(str, refusals))
    todo = "undo these changes, or choose another run.name"
    before = [step for step in run.checkpoint_steps() if step <= old.decay_begins]
    is_longer = {change.key for change in refusals} <= {*LENGTHS}
    if is_longer and old.batch_ramp != job.batch_ramp:
        steps = f"its steps would be of {job.batch_ramp}, where they are of {old.batch_ramp}"
        problem += f"; and {steps}"
        todo = "undo these changes, or write train.batch_ramp in steps or tokens next time"
        if (same := job.with_ramp_of(old)) is not None:
            todo = f"write train.batch_ramp='{same.train.batch_ramp}' too, or undo these changes"
    elif is_longer and job.total_steps > old.total_steps:
        problem += "; and its learning rate has begun to decay"
        if before:  # a longer run branches off there
            branch = f"run.name=NEW run.from.run={run.name} run.from.step={before[-1]}"
            todo = f"go on from before the decay with {branch}, or undo these changes"
    raise UserError(str(run.path), problem, todo)


def _freeze(run: Run, job: TrainJob, changed: list[str]) -> None:
    write_file(run.config, frozen_file(job))
    if "run.access" in changed:
        run.path.chmod(job.run.mode)


def _keep(run: Run, job: TrainJob, sources: Sources) -> None:
    """Copy to a run what it needs of its data and its origin, and delete files of an earlier
    origin: the chat template of the data, else of the origin; the files of imported weights; and
    the references, if both learn preferences."""
    origin, build = origin_of(job), sources.first.manifest.get("build") or {}
    if template := build.get("template"):
        write_checked_json(run.chat, {"chat_template": template})
    else:
        _copy(origin.chat if origin else None, run.chat)
    _copy(origin.imported if origin else None, run.imported)  # `export` reads it
    goes_on = job.objective.are_preferences and job.run.origin.load != "weights"
    _copy(origin.references if origin and goes_on else None, run.references)


def _copy(old: Path | None, new: Path) -> None:
    if old is not None and old.is_file():
        write_file(new, old.read_bytes())
    else:
        new.unlink(missing_ok=True)


def _correct(run: Run, old: TrainJob, job: TrainJob, sources: Sources) -> tuple[str, ...]:
    """Replace the config, and the data if they differ, of a run that has made no step. Return a
    sentence about the changes, if there are any."""
    changes = diff(old, job)
    differences = [str(change) for change in changes if change.kind == "identity"]
    stored, tokenizer = data_of(run), sources.first.tokenizer_json
    if stored["identity"] != sources.identity:
        differences.append(f"data: {stored['path']} -> {sources.where}")
    # A kill in between leaves a run that the same command corrects again.
    if not run.tokenizer.exists() or run.tokenizer.read_bytes() != tokenizer:
        write_file(run.tokenizer, tokenizer)
    if differences:
        _keep(run, job, sources)
        measured = ("parameters", "device")  # of the old config; the next attempt adds them
        fields = {k: v for k, v in run.read_identity().items() if k not in measured}
        write_checked_json(run.identity, fields | _of_data(sources) | {"versions": versions()})
    if changes:
        _freeze(run, job, [change.key for change in changes])
    if not differences:
        return ()
    text = "; ".join(differences)
    return (f"{run.path} has made no step yet, so its config is replaced: {text}.",)


def open_sources(data: DataConfig) -> Sources:
    """Open the datasets of a job; the embedded corpus is prepared first if it is missing."""
    if data.sources:
        opened = {name: open_dataset(path, data) for name, path in data.sources.items()}
    elif data.path:
        opened = {ONLY: open_dataset(data.path, data)}
    else:
        with progress_display() as progress:
            path = prepare_embedded(data.cache_directory, progress, data.embedded)
        opened = {ONLY: Dataset(path)}
    sources = Sources(opened)
    _ = sources.tokenizer  # verified now: it is needed at the end of the run
    return sources


def embedded_vocabulary(data: DataConfig) -> int | None:
    """Return the vocabulary size of the embedded corpus, which needn't exist for that; None if the
    job names other data."""
    return None if data.path or data.sources else VOCABULARY[data.embedded]


def open_dataset(path: str, data: CorpusConfig) -> Dataset:
    """Open the dataset in a directory, or at a URL through the cache."""
    where = path if "://" in path else Path(path).expanduser()
    return Dataset(where, data.cache_directory / "remote", data.cache_bytes)


def settle(job: TrainJob, sources: Sources) -> TrainJob:
    """Return the job with the values that follow from its data (vocabulary, longest sequence,
    weights of a mixture), and with a warm-up that fits its length."""
    job = job.fitted()
    # Those of whole rows are their numbers, unknown before their tables (run/feed.py).
    if sources.is_mixture and not job.data.weights and not job.objective.whole:
        job = replace(job, data=replace(job.data, weights=sources.default_weights()))
    job = replace(job, objective=with_special_tokens(job.objective, sources))
    if is_any_class(job.model):
        return replace(job, model=with_its_config(job.model))
    if not isinstance(job.model, ModelConfig):
        return job
    return replace(job, model=resolved_model(job, sources.vocab_size))


def with_its_config(model: Any) -> TargetConfig:
    """Return the model of model=transformers with the content of its directory's config.json, which
    a resume or an export on another machine then doesn't need. weights: whether the run begins with
    weights of the directory. Raises UserError if there is no such directory."""
    arguments = model.arguments
    if "config" in arguments:
        return TargetConfig(model.target, arguments)
    if not arguments.get("name"):
        problem, todo = "is missing", "write model.name=DIR; DIR has a config.json of transformers"
        raise UserError("model.name", problem, todo)
    folder = Path(str(arguments["name"])).expanduser().resolve()
    config = read_object(folder / "config.json", todo="give a directory with one in model.name")
    if (folder / "adapter_config.json").exists():
        problem, todo = "holds adapters of peft", "merge them into the model, and save that"
        raise UserError(str(folder), problem, todo)
    weights = any(folder.glob("model*.safetensors"))
    if not weights and any(folder.glob("*.bin")):
        problem = "holds weights as pickles (*.bin) alone, and reading these could run code"
        todo = "load them and write model.save_pretrained(DIR, safe_serialization=True)"
        raise UserError(str(folder), problem, todo)
    files = {"config": json.dumps(config, sort_keys=True), "weights": weights}
    return TargetConfig(model.target, {**arguments, "name": str(folder), **files})


def _check_resume(job: TrainJob, run: Run) -> None:
    exists = run.config.exists()
    if job.run.resume == "must" and not exists:
        raise UserError(str(run.path), "there is no run to resume", "check run.name and run.root")
    if job.run.resume == "never" and any(a.parent for a in run.attempts()):
        todo = "choose another run.name, or run.resume=auto to resume it"
        raise UserError(str(run.path), "the run exists already", todo)
    is_occupied = run.path.exists() and any(run.path.iterdir())
    if is_occupied and not run.config.exists():  # again: another command may make it just now
        problem = "is neither empty nor a run (no config.yaml)"
        raise UserError(str(run.path), problem, "choose another run.name or run.root")


def _check_data(run: Run, sources: Sources) -> None:
    stored = data_of(run)
    if stored["identity"] != sources.identity:
        problem = f"the run was started on other data ({stored['path']}) than {sources.where}"
        todo = "give its data.path, or choose another run.name"
        raise UserError(str(run.path), problem, todo)


def _of_data(sources: Sources) -> dict[str, Any]:
    digest = hashlib.sha256(sources.first.tokenizer_json).hexdigest()
    return {"tokenizer_sha256": digest, "dataset": data_fields(sources)}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


@cache
def _version(package: str) -> str:
    """Return the version of an installed package, whose long description is parsed too."""
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that isn't installed
        return "unknown"


def numerics(
    job: TrainJob, world_size: int, device: str, threads: int, compiled: bool | str
) -> dict[str, Any]:
    """Return the settings and versions that must stay equal for a resumed run to be bit-identical
    to an unbroken one. compiled: "parts" where each is compiled alone."""
    kinds, rules = leaves(TrainJob), plain(job.guard)
    guard = {f"guard.{k}": str(v) for k, v in rules.items()}
    return {
        **{path: rule for path, rule in guard.items() if kinds[path].kind == "numerics"},
        "world_size": "any" if job.train.invariant else world_size,
        "invariant": job.train.invariant,
        "sequence_parallel": job.engine.sequence_parallel,
        "context_parallel": job.engine.context_parallel,
        "tensor_parallel": job.engine.tensor_parallel,
        "stage": job.engine.stage,
        "expert_parallel": job.engine.expert_parallel,
        "shard_group": "any" if job.train.invariant else job.engine.shard_group,
        "pipeline_parts": job.engine.pipeline_parallel * job.engine.chunks,
        "precision": job.precision.label,
        "gradients": "fp32" if job.adds_in_fp32(world_size) else "precision",
        "micro_batch": job.train.micro_batch,
        "compiled": compiled,
        "activation_memory_budget": job.train.activation_memory_budget,
        "attention_kernel": job.train.attention_kernel,
        "mlp_chunk": job.model.mlp.columns if isinstance(job.model, ModelConfig) else None,
        "offload": job.engine.offload_optimizer or job.engine.offload_parameters,
        "quantized_weights": job.engine.quantized_weights,
        "deepspeed": job.engine.deepspeed,
        "exact": exactness(job.train.deterministic, device != "cpu").holds,
        "threads": threads,
        "device": device,
        **({"transformers": _version("transformers")} if is_any_class(job.model) else {}),
        **versions(),
    }
