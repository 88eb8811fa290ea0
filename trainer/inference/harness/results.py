"""Scores on tasks of lm_eval as a table for people, and as objects for programs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable

from forescale.ground.errors import UserError
from forescale.ground.storage import make_folder, write_file
from forescale.inference.harness.scores import TaskScore, lm_eval_version

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
