"""The scores of a run's model on tasks of lm_eval, with their provenance: a table for
people, objects for programs."""

import io
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, hash_string

from forescale.ground.errors import UserError
from forescale.ground.storage import make_folder, write_file
from forescale.inference.harness.language_model import LanguageModel
from forescale.inference.harness.tasks import Loaded, content_hash, leaves, quiet
from forescale.run.abilities import interval_of

_RESAMPLES = 1000  # of a standard error that has no formula


@dataclass(frozen=True)
class Metric:
    """A number of a task. stderr: its standard error; interval: its 90 % interval if it is a share
    of the questions (Wilson 1927); None: there is none."""

    value: float
    stderr: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class TaskScore:
    """The score of a model on a task or a group.

    metrics: by name, as in acc or exact_match,strict-match, the second part a filter of the task;
    version: of the task, as its file has it; file, sha256: its file, and the hash of that and of
    those that it includes; questions_hash: of all questions and right answers (None for groups);
    cut_rows, cut_tokens: how many rows were too long, and the tokens that they lost.
    """

    task: str
    shots: int | None
    questions: int
    metrics: dict[str, Metric]
    version: str | None
    file: str | None
    sha256: str | None
    questions_hash: str | None
    cut_rows: int
    cut_tokens: int
    samples: list[dict[str, Any]]


def scores_of(
    model: LanguageModel,
    tasks: dict[str, Loaded],
    shots: Sequence[int] = (),
    questions: int | None = None,
    chat: bool = False,
) -> Iterator[TaskScore]:
    """Yield the score on each task at each number of solved examples before a question.

    shots: (): as the tasks say. questions: the first n of each task; None: all. chat: use the run's
    chat template, with examples as earlier turns. Raises UserError for a task that the model
    can't do.
    """
    for name, loaded in tasks.items():
        defaults = {task.task_name: task.get_config("num_fewshot") for task in leaves(loaded)}
        for count in shots or (None,):
            # The seeds with which lm_eval draws the examples.
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            for task in leaves(loaded):
                task.set_fewshot_seed(DEFAULT_OTHER_SEED)
                default = defaults[task.task_name]
                if default == 0 and count:
                    problem = f"the task {task.task_name} always has 0 examples: "
                    problem += "its file says num_fewshot: 0"
                    todo = "leave shots out, or take that line out of its file"
                    raise UserError("shots", problem, todo)
                number = (default or 0) if count is None else count
                task.set_config(key="num_fewshot", value=number)
            model.title = Path(name).stem
            model.restart()
            yield from _scored(model, name, loaded, questions, chat)


def lm_eval_version() -> str:
    """Return the version of lm_eval."""
    return version("lm_eval")


def _scored(
    model: LanguageModel, name: str, loaded: Loaded, questions: int | None, chat: bool
) -> Iterator[TaskScore]:
    try:
        with quiet(), _own_process():
            # Its `simple_evaluate` would do the same, and describe this machine for a minute.
            results = evaluate(
                model,
                TaskManager(include_defaults=False).load(loaded),
                limit=questions,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                bootstrap_iters=_RESAMPLES,
            )
    except jinja2.TemplateError as e:
        raise UserError(name, f"a template of it fails ({e})", "correct its file") from e
    assert results is not None  # None: on other ranks
    for task, numbers in results["results"].items():
        samples = results["samples"].get(task, [])
        about = results["configs"].get(task, {}).get("metadata") or {}
        path = Path(about.get("config_source", "inline"))
        file = path if path.is_file() else None
        hashes = [s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples]
        metrics = dict(_metrics(numbers, samples))
        if not metrics:
            continue
        known = results["versions"].get(task)
        parts = [*_parts(task, results["group_subtasks"])]
        yield TaskScore(
            task=task,
            shots=results["n-shot"].get(task),
            questions=numbers["sample_len"],
            metrics=metrics,
            version=None if known in (None, "Yaml") else str(known),
            file=None if file is None else str(file),
            sha256=None if file is None else content_hash(file),
            questions_hash=hash_string("".join(hashes)) if hashes else None,
            cut_rows=sum(model.cut_rows[part] for part in parts),
            cut_tokens=sum(model.cut_tokens[part] for part in parts),
            samples=samples,
        )


def _parts(name: str, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the tasks of a group, also of groups in it; of a task, its own name."""
    for part in groups.get(name, ()):
        yield from _parts(part, groups)
    if name not in groups:
        yield name


@contextmanager
def _own_process() -> Iterator[None]:
    """Let lm_eval resample in this process, and print nothing."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        del os.environ["DISABLE_MULTIPROC"]
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


def _metrics(
    numbers: dict[str, Any], samples: list[dict[str, Any]]
) -> Iterator[tuple[str, Metric]]:
    for key, value in numbers.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = numbers.get(f"{metric}_stderr,{filter_name}")
        stderr = float(stderr) if isinstance(stderr, int | float) else None
        values = [one[metric] for one in samples if one["filter"] == filter_name and metric in one]
        interval = None  # of what was averaged, if all of it is 0 or 1
        if values and all(isinstance(v, bool | int | float) and v in (0, 1) for v in values):
            right = int(sum(values))
            if math.isclose(right / len(values), value):
                interval = interval_of(right, len(values))
        yield (metric if filter_name == "none" else key, Metric(float(value), stderr, interval))


_HASH = 12  # digits of a hash that people see


def table(scores: Sequence[TaskScore]) -> str:
    """Return a line for each number, and under them where the tasks come from and what was cut."""
    rows = [("task", "examples", "questions", "metric", "value")]
    for score in scores:
        shots = "" if score.shots is None else f"{score.shots:,}"
        first = (score.task, shots, f"{score.questions:,}")
        for name, metric in score.metrics.items():
            text = f"{metric.value:.4f}"
            if metric.stderr is not None:
                text += f" ± {metric.stderr:.4f}"
            if metric.interval is not None:
                low, high = metric.interval
                text += f" ({low:.4f} to {high:.4f})"
            rows.append((*first, name, text))
            first = ("", "", "")
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)) for row in rows]
    files = {s.file: s.sha256 for s in scores if s.file and s.sha256}
    notes = [f"{file}: SHA-256 {sha256[:_HASH]}" for file, sha256 in files.items()]
    notes += [
        f"{score.task}: {score.cut_rows:,} texts were longer than the model reads, and lost "
        f"{score.cut_tokens:,} tokens at their begin"
        for score in scores
        if score.cut_rows
    ]
    return "\n".join(f"  {line}".rstrip() for line in [*lines, *([""] if notes else []), *notes])


def as_facts(score: TaskScore) -> dict[str, Any]:
    """Return a score as an object of JSON; trainer/inference/README.md has the keys."""
    metrics = {}
    for name, metric in score.metrics.items():
        low, high = metric.interval or (None, None)
        facts = dict(value=metric.value, stderr=metric.stderr, low=low, high=high)
        metrics[name] = {k: v if v is None or math.isfinite(v) else None for k, v in facts.items()}
    return {
        "task": score.task,
        "shots": score.shots,
        "questions": score.questions,
        "metrics": metrics,
        "cut_texts": score.cut_rows,
        "cut_tokens": score.cut_tokens,
        "task_version": score.version,
        "task_file": score.file,
        "task_sha256": score.sha256,
        "asked_sha256": score.questions_hash,
        "lm_eval": lm_eval_version(),
    }


def new_file(name: str) -> Path:
    """Return the file of answers, in a folder that exists from now on. Raises UserError if the file
    exists, and the errors of `make_folder`: before the questions, which may take hours."""
    file = Path(name).expanduser()
    if file.exists():
        raise UserError(name, "exists already", "choose another file with answers=FILE")
    make_folder(file.parent)
    return file


def write_answers(path: Path, scores: Sequence[TaskScore]) -> None:
    """Write each question, as lm_eval logs one, with its task and shots, a line each."""
    lines = (
        json.dumps(
            {"task": score.task, "shots": score.shots, **sample},
            ensure_ascii=False,
            default=handle_non_serializable,
        )
        for score in scores
        for sample in score.samples
    )
    write_file(path, (f"{line}\n".encode() for line in lines))
