"""A run that begins with the state of another one (`run.from`): its step, and what must fit.

Invariant: a branch belongs to one checkpoint of its origin. Its step is frozen with the config of
the branch, so that no later checkpoint takes its place. Its data has the tokenizer of the origin:
in another one the same ids are other text.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from forescale.config.frozen import thaw
from forescale.config.target import is_any_class
from forescale.config.train import TrainJob
from forescale.data.dataset import Sources
from forescale.data.tokenizer import load_tokenizer
from forescale.ground.errors import UserError
from forescale.ground.storage import hash_file
from forescale.run.directory import Run
from forescale.run.references import misfit, stored_references

NewestStep = Callable[[Run], int]


def origin_of(job: TrainJob) -> Run | None:
    """Return the run that a job branches off. Raises UserError if it doesn't exist."""
    origin = job.run.origin
    return None if origin.run is None else Run.existing(origin.run, job.run.root)


def with_step(job: TrainJob, frozen: TrainJob | None, newest: NewestStep | None) -> TrainJob:
    """Return the job with the step at which it branches off: that of its frozen config, else the
    newest of its origin. newest: returns the step of a run's newest checkpoint; None leaves the
    step open."""
    origin = job.run.origin
    if origin.run is None or origin.step is not None:
        return job
    if frozen is not None and frozen.run.origin.run == origin.run:
        step = frozen.run.origin.step
    else:
        step = newest(Run.existing(origin.run, job.run.root)) if newest else None
    return replace(job, run=replace(job.run, origin=replace(origin, step=step)))


def _check_vocabulary(folder: Path, sources: Sources) -> None:
    """Raise UserError if the weights in a directory know a token of the data by another id."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    here = sources.tokenizer.get_vocab()
    known = load_tokenizer(path).get_vocab().items()
    # Ids behind the data's are in no text; an export names those of masks and spans.
    if any(here.get(token) != i for token, i in known if i < len(here)):
        problem = f"its weights were trained with another tokenizer than that of {sources.where}"
        todo = f"build the data with `forescale shards ... tokenizer={folder}`"
        raise UserError(f"model.name={folder}", problem, todo)


def _check_class(origin: Run, job: TrainJob) -> None:
    """Raise UserError if the command names another directory for a class of transformers than the
    origin has, whose config is its model."""
    if not is_any_class(job.model):
        return
    base, name = thaw(TrainJob, origin.config, trust=True).model, str(job.model.arguments["name"])
    stored = base.arguments["name"] if is_any_class(base) else None  # looked at, not run
    if stored not in (name, str(Path(name).expanduser().resolve())):
        problem = f"a branch has the model of {job.run.origin.run}"
        todo = "leave out model and model.name; or leave out run.from, to begin with this directory"
        raise UserError("model.name", problem, todo)


def check_origin(job: TrainJob, sources: Sources) -> None:
    """Raise UserError if weights of transformers are of another tokenizer than the data, or if a
    branch can't begin with its origin's state: its tokenizer differs, or the directory of a class
    of transformers; it keeps the position in the data, and the data differ, or the clusters that
    share them; it would end before it begins; or it continues with references that its origin
    doesn't have, or has for other rows."""
    run, origin = origin_of(job), job.run.origin
    if run is None:
        if is_any_class(job.model) and job.model.arguments["weights"]:
            _check_vocabulary(Path(job.model.arguments["name"]), sources)
        return
    if not run.tokenizer.is_file():
        raise UserError(str(run.tokenizer), "no such file", "restore the run's tokenizer.json")
    digest = hash_file(run.verified_tokenizer()).sha256
    if digest != hashlib.sha256(sources.first.tokenizer_json).hexdigest():
        problem = f"{origin.run} was trained with another tokenizer than that of {sources.where}"
        todo = f"build the data with `forescale shards ... tokenizer={run.tokenizer}`"
        raise UserError("run.from", problem, todo)
    _check_class(run, job)
    if origin.load == "weights":
        return
    if how := run.weights_alone:
        problem = f"{origin.run} holds {how} weights alone, no optimizer state and no place in data"
        raise UserError("run.from", problem, "write run.from.load=weights")
    stored = data_of(run)
    if stored["identity"] != sources.identity:
        problem = f"{origin.run} was trained on other data ({stored['path']}) than {sources.where}"
        raise UserError("run.from", problem, "give its data.path, or run.from.load=weights")
    step, total = origin.step, job.total_steps
    if step is not None and step >= total:
        problem = (
            f"this run would end at step {total:,}, and {origin.run} is at step {step:,} already: "
            "the length counts from the origin's first step"
        )
        longer = step + max(1, total - job.decay_begins)
        todo = f"write train.steps={longer} or more, or run.from.load=weights to begin at step 0"
        raise UserError("run.from", problem, todo)
    if step is not None:
        _check_ramp(run, job, step)
    if not job.objective.are_preferences:
        return
    name, references = origin.run, stored_references(run)
    begin = "run.from.load=weights to begin at step 0 with its weights as the reference"
    if references is None:
        problem = f"{name} has no {run.references.name}, so there is no reference to go on with"
        raise UserError("run.from", problem, f"write {begin}")
    if differs := misfit(references["made"], job, sources):
        problem = f"the {run.references.name} of {name} {differs}"
        todo = f"give the data and the length of {name}, or write {begin}"
        raise UserError("run.from", problem, todo)


def _check_ramp(origin: Run, job: TrainJob, step: int) -> None:
    """Raise UserError if the batch ramps of branch and origin give different numbers of windows up
    to a step: the length of the branch would not be what it reads; or if as many windows of a
    member are other windows of the data, so that some would be read twice, or never."""
    origin_job = thaw(TrainJob, origin.config, trust=True)  # looked at, not run
    if (members := origin_job.outer.count) != job.outer.count:
        counts = [f"{n} members" if n > 1 else "one cluster" for n in (members, job.outer.count)]
        problem = f"{job.run.origin.run} was trained on {counts[0]}, and this run is on {counts[1]}"
        todo = "give outer.* as many members, or run.from.load=weights to begin at step 0"
        raise UserError("run.from", problem, todo)
    read, counted = origin_job.batch_ramp.samples(step), job.batch_ramp.samples(step)
    if read == counted or not (origin_job.batch_ramp.lengths or job.batch_ramp.lengths):
        return
    problem = f"{job.run.origin.run} has read {read:,} windows at step {step:,}, where the batch "
    problem += f"of this run would have read {counted:,}"
    todo = "give the batches of its steps"
    if (same := job.with_ramp_of(origin_job)) is not None:
        first, length = same.train.first_batch, same.train.batch_ramp
        todo = "leave train.first_batch and train.batch_ramp out, as it does"
        if first is not None:
            todo = f"write train.first_batch={first} train.batch_ramp='{length}', as it does"
    raise UserError("run.from", problem, f"{todo}, or run.from.load=weights to begin at step 0")


def data_of(run: Run) -> dict[str, str]:
    """Return the path and identity of the data on which a run was started."""
    stored = run.read_identity()["dataset"]
    return {"path": str(stored["path"]), "identity": str(stored["identity"])}
