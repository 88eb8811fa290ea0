"""The summary of a complete run: bits per byte of model and compressors, a sample, next steps."""

import math
import shlex
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from forescale.config.target import is_any_class, targets
from forescale.data.dataset import Dataset
from forescale.data.prepare.sample import bits_per_byte, primed
from forescale.ground.errors import UserError
from forescale.inference.export import family
from forescale.inference.view import RunView
from forescale.models.config import ModelConfig
from forescale.run.rows import read_rows
from forescale.run.start import Start

_WORDS, _LETTERS = 5, 40  # at most, of a prompt
_OPENING, _DOCUMENTS = 64, 100  # tokens of a document with these words; documents


def summarize(started: Start, generate: Callable[[list[str]], int]) -> None:
    """Print the summary of a complete run. generate: prints what `forescale generate` with these
    words prints."""
    run, sources = started.run, started.sources
    scores = read_rows(run.metrics, kind="validation")
    if not started.job.continues_text or started.job.objective.whole:
        _summarize_other(started, scores)
        return
    if scores:
        bits = {row["dataset"]: row["bits_per_byte"] for row in scores}
        if not sources.is_mixture:
            title = f"corpus hash {sources.corpus_hash[:16]}"
            tokens = 0 if started.job.run.origin.run else scores[-1]["tokens"]
            cache = started.job.data.cache_directory
            _print_score(title, bits["validation"], sources.first, tokens, cache)
        for name, dataset in sources.datasets.items() if sources.is_mixture else ():
            if name in bits:
                title = f"{name}, corpus hash {dataset.corpus_hash[:16]}"
                _print_score(title, bits[name], dataset)
    name, words = _name(started), first_words(sources.first)
    trust = ["trust=true"] if targets(started.job) else []  # the user has just trained this class
    prompt = [f"prompt={words}"] if words else []
    command = shlex.join(["generate", name, *prompt, *trust])
    print(f"\nA sample, as `forescale {command}` writes it:\n", flush=True)
    try:
        generate(shlex.split(command)[1:])
    except UserError as e:  # the weights are no numbers any more: the run is complete nevertheless
        print(f"No sample: {e}")
    _next(
        [
            (f"report {name}", "a page with its curves"),
            (command, "write text"),
            *_export(started),
            ("train bigger model=depth model.depth=4", "a model of your own"),
            ("shards TEXT output=DIR", "a dataset of your own"),
        ]
    )


def _name(started: Start) -> str:
    """Return the run as commands name it."""
    run = started.run
    return run.name if run.path.parent == Path("runs") else str(run.path)


def first_words(dataset: Dataset) -> str:
    """Return the first words of a held-out document, or else of a training document: a prompt of
    the kind of text that the model knows. Of the first documents that one whose first line begins
    with a letter, as text does and the comment above a source file doesn't. Empty if none can be
    read."""
    for name in ("validation", "train"):
        split, lines = dataset.split(name), list[str]()
        with suppress(UserError):
            ends = split.document_ends(0, 0, split.shard_tokens[0]) if split.shard_tokens else ()
            for start, end in pairwise([0, *ends[:_DOCUMENTS]]):
                ids = split.read(0, start, min(_OPENING, end - start - 1)).tolist()
                text = dataset.tokenizer.decode(ids, skip_special_tokens=False).rstrip("\ufffd")
                line = next((x for x in text.splitlines() if any(map(str.isalnum, x))), "")
                words = " ".join(line.split()[:_WORDS])[:_LETTERS]
                lines.append(words.partition("${")[0].strip())  # begins a reference in a command
            if line := next((x for x in lines if x[:1].isalpha()), "".join(lines[:1])):
                return line
    return ""


def _summarize_other(started: Start, scores: list[dict]) -> None:
    """Print the last scores of a model that continues no text, or learns parts of one alone: they
    compare with no compressor."""
    name, objective = _name(started), started.job.objective
    for dataset, row in {row["dataset"]: row for row in scores}.items():
        if objective.rows > 1:
            accuracy = row.get("rewards/accuracies", math.nan)
            print(f"\nHeld-out {objective.targets} ({dataset}): {accuracy:.1%} accuracy.")
            continue
        print(
            f"\nHeld-out text ({dataset}): {row['bits_per_byte']:.4f} bits per byte of "
            f"{objective.targets}."
        )
    words = first_words(started.sources.first)
    first, _, rest = words.partition(" ")
    prompt, purpose = {
        "gaps": (f"{first} <extra_id_0> {rest.partition(' ')[2]}".strip(), "fill in spans"),
        "prompt": ("SOURCE", "write its target"),
    }.get(
        objective.source_kind,
        ("PROMPT", "write its response") if objective.whole else (words, "write text"),
    )
    model = started.job.model
    is_known = isinstance(model, ModelConfig) or is_any_class(model)
    writes = (objective.source_kind or objective.whole) and is_known
    _next(
        [
            (f"report {name}", "a page with its curves"),
            (f"eval {name}", "its loss on other text"),
            *([(shlex.join(["generate", name, f"prompt={prompt}"]), purpose)] if writes else []),
            *_export(started),
        ]
    )


def _export(started: Start) -> list[tuple[str, str]]:
    """Return the command that exports the run, none if no class of transformers fits."""
    with suppress(UserError):
        family(RunView(started.run))
        return [(f"export {_name(started)}", "to Hugging Face transformers")]
    return []


def _next(commands: list[tuple[str, str]]) -> None:
    """Print what one may type now, and for what."""
    print("\nNext:")
    for command, purpose in commands:
        print(f"  forescale {command:<38}  {purpose}")


def _print_score(
    title: str, bits: float, dataset: Dataset, tokens: int = 0, cache: Path | None = None
) -> None:
    """Print the bits per byte of model and compressors on the held-out text of a source, and who
    needs the fewest. tokens: that the model was trained on, 0 if they are of several sources, or
    if it began with the weights of another."""
    print(f"\nHeld-out text, in bits per byte ({title}):")
    rows, model = bits_per_byte(dataset.manifest), "this model"
    if tokens and cache:
        split = dataset.split("train")
        size = min(split.num_bytes, round(tokens * split.num_bytes / split.num_tokens))
        model = f"{model}, trained on {size / 1e6:.3g} MB"
        try:
            if row := primed(dataset, size, cache):
                rows = dict(sorted([*rows.items(), row], key=lambda row: -row[1]))
        except UserError as e:  # the run is complete nevertheless
            print(f"  PPMd wasn't given the training text: {e}")
    widest = max(map(len, (model, *rows)))
    print(f"  {model:<{widest}}  {bits:.4f}")
    for name, value in rows.items():
        ratio = f"the model needs {bits / value:.3f} times this"
        print(f"  {name:<{widest}}  {value:.4f}   {ratio}")
    if rows:
        best = min(rows, key=lambda name: rows[name])
        print(f"Fewest bits: {model if bits < rows[best] else best}.")
