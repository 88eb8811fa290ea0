"""`forescale finetune`: fine-tune the weights of a run on examples of prompts and responses.

Invariant: the result is an ordinary run, which `forescale train` trains and resumes. Its dataset is
built from the file of examples, in the cache.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from forescale.checkpoint.choice import newest_step
from forescale.config.compose import compose
from forescale.config.frozen import thaw
from forescale.config.job import Problems, overrides_of
from forescale.config.schema import key, plain
from forescale.config.target import remember
from forescale.config.train import TrainJob
from forescale.data.conversations.examples import unit_of
from forescale.data.conversations.prepare import (
    Request,
    faults_sentence,
    has_preferences,
    prepare_conversations,
)
from forescale.data.dataset import Dataset
from forescale.ground.console import progress_display
from forescale.ground.document import tell_line
from forescale.ground.errors import DONE, UserError
from forescale.inference.view import RunView, open_view
from forescale.plan.oom import fits_here
from forescale.resilience import launcher
from forescale.run.directory import Run, is_hf
from forescale.run.feed import reads_source, whole_rows_of
from forescale.run.finetune import (
    EPOCHS,
    LATER_EPOCHS,
    LENGTH,
    UPDATES,
    around_source,
    chat_template,
    default_epochs,
    expect_writer,
    first_config,
    num_rows,
    smaller_batch,
    vocabulary_of_run,
    with_examples,
)
from forescale.run.start import Start, start
from forescale.verbs import load
from forescale.verbs.train import check, local_ranks


@dataclass
class FinetuneJob(TrainJob):
    """The keys of `train`, with the values of FROM as defaults, and those of the examples."""

    VERB: ClassVar[str] = "finetune"
    TARGET: ClassVar[str] = "run.from.run"
    TYPED: ClassVar[Mapping[str, str]] = {"data": "file"}

    # the examples, typed as data=FILE (.jsonl, .json, .parquet) or data=hf://NAME:SPLIT. Rows are
    # {"prompt": TEXT, "response" or "completion": TEXT}, {"messages": [{"role": "user", "content":
    # TEXT}, ...]}, {"conversations": [{"from": "human", "value": TEXT}, ...]} or {"instruction":
    # TEXT, "input": TEXT, "output": TEXT}; or preferences, {"prompt": TEXT, "chosen": TEXT,
    # "rejected": TEXT}
    file: str | None = key(None, common=True)
    epochs: float | None = key(
        None,
        f"how often each example is read, unless train.steps is typed; null: {EPOCHS:g} times, "
        f"preferences {LATER_EPOCHS:g}; of few examples a step has fewer, for {UPDATES} steps",
        gt=0,
        common=True,
    )
    # fraction of the examples that is held out for validation
    held_out: float = key(0.05, ge=0, le=0.5)
    # invalid examples, and those longer than train.sequence_length: stop with their list, or skip
    # them with a note
    unusable: Literal["fail", "skip"] = "fail"
    # chat template, a file in Jinja; null: that of FROM's tokenizer, else a plain one
    template: str | None = None
    # make the run and stop; then: forescale plan NAME, forescale submit train NAME
    prepare_only: bool = False

    def problems(self, world_size: int | None = None) -> Problems:
        problems = super().problems(world_size)
        todo = "write forescale finetune FROM data=FILE.jsonl"
        if not self.run.origin.run:
            problems.append(("run.from.run", "names no run to fine-tune", todo))
        if self.train.first_batch is not None:
            problem = "a fine-tuning counts epochs of examples, with one batch in all steps"
            problems.append(("train.first_batch", problem, "leave it out, and train.batch_ramp"))
        if not self.file:
            problems.append(("data", "names no file of examples", todo))
        if self.run.origin.load != "weights" and self.run.origin.run:
            problem = "a fine-tuning begins at step 0, with the weights alone"
            problems.append(("run.from.load", problem, "leave it out"))
        return problems


JOB = FinetuneJob
EXAMPLES = (
    "finetune first data=questions.jsonl",
    "finetune first data=chats.jsonl run.name=chat epochs=2 optimizer.learning_rate=1e-4",
    "finetune runs/first/checkpoints/step-00002000 data=questions.jsonl unusable=skip",
    "finetune first data=questions.jsonl lora.rank=16",
    "finetune first data=chats.jsonl data.packing=best_fit data.document_mask=true",
    "finetune first data=chats.jsonl template=chatml.jinja prepare_only=true",
    "finetune first-chats data=preferences.jsonl objective.beta=0.2",
)


def main(arguments: list[str]) -> int:
    """Make the run, or find it, and train it. Returns the exit code of `train`."""
    if launcher.started_as_rank():
        todo = "write prepare_only=true without a launcher, then start forescale train NAME with it"
        raise UserError("finetune", "was started as a rank", todo)
    words, view = _named(arguments)
    file = _typed(words, "file")
    kind = _typed(words, "objective") or _typed(words, "objective.kind")
    are_preferences = kind == "preferences" if kind else bool(file and has_preferences(file))
    expect_writer(view.name, view.config, are_preferences)

    def base_config(directory: Path) -> dict[str, Any]:
        """Return the config under the command's keys: that of the run itself if it exists. The file
        of examples decides between responses and preferences, unless the objective is typed."""
        run = Run(directory)
        if run.config.exists():
            return plain(thaw(TrainJob, run.config, trust=True))
        has_adapters = (_typed(words, "lora.rank") or "0") != "0"
        return first_config(view.config, view.run.is_import, are_preferences, has_adapters)

    job = compose(FinetuneJob, words, find=base_config)
    kinds = ("pairs",) if reads_source(view.config.model) else ("responses", "preferences")
    if job.objective.kind not in kinds:
        problem = f"a fine-tuning learns {' or '.join(kinds)}, not {job.objective.kind}"
        raise UserError("objective", problem, "leave it out: the file of examples decides")
    is_new = not Run(job.run.directory).config.exists()
    vocabulary = vocabulary_of_run(view.run)
    template = chat_template(view.run, vocabulary, job.template)
    template.check()
    request = Request(
        vocabulary,
        template,
        most=job.train.sequence_length + 1,
        held_out=job.held_out,
        unusable=job.unusable,
        are_preferences=job.objective.are_preferences,
        around=around_source(job, vocabulary),
    )
    with progress_display() as progress:
        cache = job.data.cache_directory
        dataset = prepare_conversations(job.file or "", cache, request, progress)
    has_length = any(word.startswith(("train.steps=", "train.tokens=")) for word in words)
    is_settled = has_length or not (is_new or any(word.startswith("epochs=") for word in words))
    epochs = job.epochs or default_epochs(job.objective.are_preferences)
    ready = job.training
    if is_new and not is_settled:
        ready = _with_batch(ready, words, dataset, epochs, view.run.is_import, job.prepare_only)
    ready = with_examples(ready, dataset, None if is_settled else epochs)
    check(ready, local_ranks(ready))
    started = start(ready, newest=newest_step)
    remember(started.job, started.run.path)
    _introduce(started, dataset, is_new, job.file or "")
    if job.prepare_only:
        where = str(started.run.path)
        tell_line({"kind": "prepared", "run": started.run.name, "path": where})
        print(f"\nNext:\n  forescale plan {where}\n  forescale train {where}")
        return DONE
    return load("train").main([str(started.run.path)])


def _with_batch(
    job: TrainJob, words: list[str], dataset: Dataset, epochs: float, is_import: bool, later: bool
) -> TrainJob:
    """Return the job with what is not typed: of few examples a smaller global batch; of imported
    weights rows as the examples need, and as many at once as fit in this machine's memory.

    later: another machine will train, perhaps with the eight GPUs of a usual node.
    """
    ranks = job.launch.processes.most if job.launch.processes else max(1, len(launcher.gpus()))
    if is_import and _typed(words, "train.sequence_length") is None:
        # Of its model, maybe 131,072. Examples have less than 2 ** n tokens, where n lengths count.
        enough = max(LENGTH, 2 ** len(dataset.manifest["report"]["lengths"]))
        enough *= 1 + (job.objective.kind == "pairs")  # half of them for the source
        columns = min(job.train.sequence_length, enough)
        job = replace(job, train=replace(job.train, sequence_length=columns))
    if _typed(words, "train.global_batch") is None:
        rows = num_rows(job, dataset)
        job = smaller_batch(job, rows, epochs, max(ranks, 8) if later else ranks)
    if later or not is_import or _typed(words, "train.micro_batch") is not None:
        return job
    batch = job.train.global_batch
    sizes = (n for n in range(batch // ranks, 0, -1) if batch % (n * ranks) == 0)
    jobs = (replace(job, train=replace(job.train, micro_batch=n)) for n in sizes)
    return next((one for one in jobs if fits_here(one, ranks)), job)


def _named(arguments: list[str]) -> tuple[list[str], RunView]:
    """Return the arguments as overrides, with a name for the run, and the run to fine-tune."""
    overrides = overrides_of(FinetuneJob, arguments)
    name = _typed(overrides, "run.from.run")
    if name is None:
        compose(FinetuneJob, overrides)  # names all that is wrong, this too
        raise AssertionError("a command without FROM was taken")
    view = open_view(name, _typed(overrides, "run.root") or "runs")
    if is_hf(Path(name).expanduser()):
        overrides += overrides_of(FinetuneJob, [str(view.path)])
    if view.chosen is not None:
        run, chosen = view.run, view.chosen.resolve()
        (step,) = (n for n in run.checkpoint_steps() if run.checkpoint_path(n).resolve() == chosen)
        overrides += [*overrides_of(FinetuneJob, [str(run.path)]), f"run.from.step={step}"]
    if _typed(overrides, "run.name") is None:
        stem = Path(_typed(overrides, "file") or "tuned").name.partition(".")[0]
        overrides.append(f"run.name={view.name}-{re.sub(r'[^a-zA-Z0-9_-]', '-', stem)}")
    return overrides, view


def _typed(words: list[str], name: str) -> str | None:
    values = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return values[-1].strip("'\"") if values else None


def _introduce(started: Start, dataset: Dataset, is_new: bool, file: str) -> None:
    job, parts = started.job, dataset.manifest["splits"]
    origin = job.run.origin
    (rows,) = whole_rows_of(job, started.sources, "train", in_training=True).values()
    is_packed = job.data.packing == "best_fit"
    unit = "row" if is_packed else "example"
    packed = f" The training examples fill {rows.counts.sum():,} rows." * is_packed
    print(
        f"{'Fine-tunes' if is_new else 'Goes on fine-tuning'} {origin.run}, from its step "
        f"{origin.step:,}, with {parts['train']['documents']:,} examples; "
        f"{parts['validation']['documents']:,} are held out.{packed}\n"
        f"Peak learning rate {job.optimizer.learning_rate:g}, {job.total_steps:,} steps of "
        f"{job.train.global_batch:,} {unit}{'s' * (job.train.global_batch > 1)}."
    )
    left_out = dataset.manifest["report"]["left_out"]
    if sentence := faults_sentence(left_out, unit_of(file)):
        print(f"Note: {sentence}; they are left out.")
    sides = [rows.facts.get(side, 0) for side in ("longest_source", "longest_target")]
    longest, columns = rows.facts.get("longest", 2 * max(sides)), job.train.sequence_length
    if (enough := -(-longest // 64) * 64) * 2 <= columns and not is_packed:
        print(
            f"Note: the longest example has {longest:,} tokens, and a row {columns:,} columns; "
            f"train.sequence_length={enough} would do, in a fraction of the time."
        )
    sys.stdout.flush()
