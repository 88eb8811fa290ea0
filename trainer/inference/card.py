"""The model card of an export: README.md, each line of which is a fact of the run's files.

Invariant: nothing is guessed. What the files don't say is absent, or named as not stated; secrets
of addresses are masked; the command is there only if it composes to the run's own config.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from forescale.checkpoint.reader import Checkpoint
from forescale.config.compose import compose
from forescale.config.job import words_of
from forescale.config.schema import flatten, plain
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError, masked
from forescale.inference.export import auto_of
from forescale.inference.remote_code import CLASSES
from forescale.inference.view import RunView
from forescale.models.config import ModelConfig
from forescale.models.flops import shapes
from forescale.run.forecast import describe
from forescale.run.rows import read_rows

CARD, PICTURE = "README.md", "loss.svg"
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSeq2SeqLM": "text2text-generation",
}
_NOT_OF_SCORES = ("run", "step", "tokens", "crc", "corpus_hash", "split", "kind")


def card(
    view: RunView, checkpoint: Checkpoint, architecture: str, dtype: str, *,
    licence: str | None = None, scores: Sequence[Path] = (), has_picture: bool = False,
) -> str:  # fmt: skip
    """Return the card as Markdown. architecture: the class of transformers; dtype: of the weights;
    licence: an SPDX name, such as apache-2.0; scores: files of `forescale eval RUN --json`;
    has_picture: whether PICTURE lies beside it. Raises UserError for scores of another run."""
    auto = auto_of(view)
    head = {
        "library_name": "transformers",
        "pipeline_tag": _TASKS[auto],
        "tags": ["forescale"],
    }
    if licence:
        head["license"] = licence
    facts = _facts(view, checkpoint, architecture, dtype, licence)
    rows = "\n".join(f"| {name} | {text} |" for name, text in facts.items())
    trusts = ", trust_remote_code=True" if architecture in CLASSES.values() else ""
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()) + "---",
        f"# {view.name}",
        f"| | |\n|---|---|\n{rows}",
        f"![loss over tokens]({PICTURE})" if has_picture else "",
        _scores(view, scores),
        f"## Use it\n\n```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
        'DIRECTORY = "."  # where this file lies\n'
        f'model = {auto}.from_pretrained(DIRECTORY, dtype="auto"{trusts})\n'
        f"tokenizer = AutoTokenizer.from_pretrained(DIRECTORY{trusts})\n```",
        _training(view),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(
    view: RunView, checkpoint: Checkpoint, architecture: str, dtype: str, licence: str | None
) -> dict[str, str]:
    config, identity, step = view.config, view.identity, checkpoint.position.step
    trained = [r for r in read_rows(view.run.metrics, kind="train") if r["step"] <= step]
    held_out = read_rows(view.run.metrics, kind="validation", dataset="validation", step=step)
    facts, how = {"class": architecture}, view.run.weights_alone
    if parameters := _parameters(view):
        facts["parameters"] = f"{parameters:,}"
    facts["weights"] = f"{dtype}, {how or f'of step {step:,} of {config.total_steps:,}'}"
    if origin := config.run.origin.run:
        facts["started from"] = f"run {Path(origin).name}, step {config.run.origin.step or 0:,}"
    if not how:
        facts[config.objective.counted] = f"{checkpoint.position.tokens:,}"
    if trained and (flops := trained[-1].get("flops_causal")):
        facts["compute"] = f"{flops:.3g} FLOPs, forward and backward"
    if held_out:
        bits = held_out[-1].get("bits_per_byte")
        error = f" ± {held_out[-1]['loss_stderr']:.2g}" if held_out[-1].get("loss_stderr") else ""
        unit = "" if config.objective.are_preferences else " nats a predicted token"
        facts["held-out loss"] = f"{held_out[-1]['loss']:.4f}{error}{unit}"
        facts["held-out loss"] += f", {bits:.4f} bits a byte" if bits is not None else ""
    read = sum((Counter(row.get("shares") or {}) for row in trained), Counter())
    for name, source in identity["dataset"]["sources"].items():
        # A branch has the rows since its origin alone.
        is_whole = read.total() == checkpoint.position.tokens > 0
        share = f", {read[name] / read.total():.1%} of the tokens" if is_whole else ""
        facts[f"data: {name}"] = f"corpus hash {(source.get('corpus_hash') or '-')[:16]}{share}"
    entries, digest = identity["dataset"]["vocab_size"], identity.get("tokenizer_sha256")
    facts["tokenizer"] = f"{entries:,} entries, {(digest or '-')[:16]}"
    facts["sequence length"] = f"{config.train.sequence_length:,} tokens"
    if scored := view.run.read_events(kind="forecast_scored", step=step):
        facts["forecast"] = describe(scored[-1])
    versions = identity.get("versions", {})
    code = [f"{name} {versions[name]}" for name in ("forescale", "torch") if name in versions]
    if commit := (identity.get("git") or {}).get("commit"):
        code.append(f"commit {commit[:12]}")
    return {**facts, "code": ", ".join(code), "licence": licence or "not stated"}


def _parameters(view: RunView) -> int | None:
    """Return the number of exported weights: adapters merged, without modules for later tokens."""
    if isinstance(model := view.config.model, ModelConfig):
        sizes = shapes(replace(model.resolved(), mtp_layers=0)).values()
        return sum(map(math.prod, sizes))
    return view.identity.get("parameters")


def _scores(view: RunView, paths: Sequence[Path]) -> str:
    """Return the table of the scores in these files; "" without any."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            lines = [
                json.loads(line) for line in path.expanduser().read_text().splitlines() if line
            ]
        except (OSError, ValueError) as e:
            todo = "make it with forescale eval RUN --json > FILE"
            raise UserError(f"scores={path}", f"holds no scores ({e})", todo) from None
        for row in lines:
            whose = row.get("run") if isinstance(row, dict) else row
            if not isinstance(row, dict) or whose != view.name:
                problem = f"has scores of {whose!r}, and this is {view.name}"
                raise UserError(f"scores={path}", problem, f"forescale eval {view.name} --json")
            flat = dict(flatten(row, ""))
            numbers = {k: v for k, v in flat.items() if k not in _NOT_OF_SCORES}
            rows.append({"step": row.get("step"), **numbers})
    if not rows:
        return ""
    lines = [f"| {', '.join(_named(row))} | {', '.join(_numbers(row))} |" for row in rows]
    return "## Scores\n\n| of | scores |\n|---|---|\n" + "\n".join(lines)


def _named(row: dict[str, Any]) -> list[str]:
    return [masked(Path(v).name or v) for v in row.values() if isinstance(v, str)]


def _numbers(row: dict[str, Any]) -> list[str]:
    kinds = (int, float)
    numbers = {k: v for k, v in row.items() if isinstance(v, kinds) and not isinstance(v, bool)}
    return [f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4f}" for k, v in numbers.items()]


def _training(view: RunView) -> str:
    """Return the command that trains such a model again; "" if no words compose to the config, or
    if the weights come from elsewhere."""
    words = None if view.run.weights_alone else command_of(view.config)
    if words is None:
        return ""
    return f"## Train it again\n\n```sh\nforescale train {masked(shlex.join(words))}\n```"


def command_of(job: TrainJob) -> list[str] | None:
    """Return the words of `forescale train` that compose to this job, those of choices first; None
    if no words do."""
    words, here = list[str](), dict[str, Any]()
    there = dict(flatten(plain(job), ""))
    for of_choices in (True, False):
        with suppress(UserError):  # a choice may need keys that come with the second turn
            here = dict(flatten(plain(compose(TrainJob, words)), ""))
        for key, value in there.items():
            differs = key not in here or here[key] != value
            if differs and key.endswith(".kind") == of_choices and key != "run.name":
                words += words_of({key.removesuffix(".kind"): value})
    try:
        again = compose(TrainJob, [f"run.name={job.run.name}", *words])
    except UserError:
        return None
    return [job.run.name, *words] if plain(again) == plain(job) else None
