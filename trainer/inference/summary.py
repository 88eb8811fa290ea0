"""The summary of a complete run: bits per byte of model and compressors, a sample, next steps."""

import math
from contextlib import suppress

from forescale.data.dataset import Dataset
from forescale.data.prepare.sample import bits_per_byte
from forescale.ground.errors import UserError
from forescale.inference.export import family
from forescale.inference.generation import Answer, GenerationConfig, stream
from forescale.inference.question import question_of
from forescale.inference.view import RunView
from forescale.models.config import ModelConfig
from forescale.models.decoding.sampler import Sampler
from forescale.run.rows import read_rows
from forescale.run.start import Start

SAMPLE_TOKENS = 120
PROMPT = "def "
_WRITE = ("import ", "write text")  # a prompt, and what it is for


def summarize(started: Start) -> None:
    """Print the summary of a complete run."""
    run = started.run
    scores = read_rows(run.metrics, kind="validation")
    if not started.job.continues_text or started.job.objective.whole:
        _summarize_other(started, scores)
        return
    if scores:
        bits = {row["dataset"]: row["bits_per_byte"] for row in scores}
        sources = started.sources
        if not sources.is_mixture:
            title = f"corpus hash {sources.corpus_hash[:16]}"
            _print_score(title, bits["validation"], sources.first)
        for name, dataset in sources.datasets.items() if sources.is_mixture else ():
            if name in bits:
                title = f"{name}, corpus hash {dataset.corpus_hash[:16]}"
                _print_score(title, bits[name], dataset)
    try:
        text = sample(started, PROMPT)
    except UserError as e:  # the weights are no numbers any more: the run is complete nevertheless
        print(f"\nNo sample: {e}")
    else:
        print(f"\nA sample, after {PROMPT!r}:\n")
        print("\n".join(f"  | {line}" for line in text.splitlines()))
    name = run.name
    exported = []
    with suppress(UserError):  # no class of transformers fits
        family(RunView(run))
        exported = [(f"export {name}", "to Hugging Face transformers")]
    _next(
        [
            (f"report {name}", "a page with its curves"),
            (f'generate {name} prompt="{_WRITE[0]}"', _WRITE[1]),
            *exported,
            ("train bigger model=depth model.depth=4", "a model of your own"),
            ("shards TEXT output=DIR", "a dataset of your own"),
        ]
    )


def _summarize_other(started: Start, scores: list[dict]) -> None:
    """Print the last scores of a model that continues no text, or learns parts of one alone: they
    compare with no compressor."""
    name, objective = started.run.name, started.job.objective
    for dataset, row in {row["dataset"]: row for row in scores}.items():
        if objective.rows > 1:
            accuracy = row.get("rewards/accuracies", math.nan)
            print(f"\nHeld-out {objective.targets} ({dataset}): {accuracy:.1%} accuracy.")
            continue
        print(
            f"\nHeld-out text ({dataset}): {row['bits_per_byte']:.4f} bits per byte of "
            f"{objective.targets}."
        )
    prompt, purpose = {
        "gaps": ("def <extra_id_0>(self):", "fill in spans"),
        "prompt": ("SOURCE", "write its target"),
    }.get(objective.source_kind, ("PROMPT", "write its response") if objective.whole else _WRITE)
    writes = (objective.source_kind or objective.whole) and isinstance(
        started.job.model, ModelConfig
    )
    _next(
        [
            (f"report {name}", "a page with its curves"),
            (f"eval {name}", "its loss on other text"),
            *([(f'generate {name} prompt="{prompt}"', purpose)] if writes else []),
        ]
    )


def _next(commands: list[tuple[str, str]]) -> None:
    """Print what one may type now, and for what."""
    print("\nNext:")
    for command, purpose in commands:
        print(f"  forescale {command:<38}  {purpose}")


def _print_score(title: str, bits: float, dataset: Dataset) -> None:
    """Print the bits per byte of model and compressors on the held-out text of a source."""
    print(f"\nHeld-out text, in bits per byte ({title}):")
    rows = {"this model": bits, **bits_per_byte(dataset.manifest)}
    widest = max(map(len, rows))
    for name, value in rows.items():
        other = value and name != "this model"  # conditional xz may need 0 bits for a tiny text
        ratio = f"   the model needs {bits / value:.3f} times this" if other else ""
        print(f"  {name:<{widest}}  {value:.4f}{ratio}")


def sample(started: Start, prompt: str, seed: int = 0) -> str:
    """Return `prompt` and the text that the newest checkpoint continues it with, up to the end of a
    document. Raises UserError if its logits are not finite."""
    view = RunView(started.run)
    model = view.model(trust=True)  # the user's command has just trained this class
    config = GenerationConfig(SAMPLE_TOKENS, Sampler(temperature=1.0, top_k=50))
    answer = Answer(view.tokenizer, question_of(view, prompt), config, seed)
    return prompt + "".join(piece for _, piece in stream(model, [answer]))
