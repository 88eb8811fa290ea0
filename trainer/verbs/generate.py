"""`forescale generate`: a trained model writes, token by token, until its document ends."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from forescale.config.compose import compose, overrides_of
from forescale.config.job import RunJob
from forescale.config.schema import key
from forescale.errors import DONE
from forescale.inference.view import open_view


@dataclass
class GenerateJob(RunJob):
    VERB: ClassVar[str] = "generate"

    target: str | None = key(None, "a run (its name or its directory) or a checkpoint")
    step: int | None = key(None, "the checkpoint at this step; null: the newest", ge=0)
    prompt: str = key("", "the text to go on from; nothing: the start of a document")
    num_tokens: int = key(200, "tokens to write", ge=1)
    temperature: float = key(0.8, "0: always the likeliest token", ge=0)
    top_k: int | None = key(50, "choose among so many likeliest tokens; null: all", ge=1)
    seed: int = key(1337, "of the sampling", ge=0)
    trust: bool = key(False, "run the class that the run's config names as its model's _target_")


JOB = GenerateJob
EXAMPLES = (
    'generate first prompt="def main("',
    "generate first step=500 temperature=0",
)


def main(words: list[str]) -> int:
    """The text goes to stdout, prompt first; everything else to stderr."""
    job = compose(GenerateJob, overrides_of(GenerateJob, words))
    view = open_view(job.target or "", job.run.root)
    checkpoint = view.checkpoint(job.step)
    from forescale.inference.device import best_device
    from forescale.inference.sampling import pieces, prompt_ids, sampled

    model = view.load(checkpoint, job.trust).to(best_device())
    end = view.identity["dataset"]["end_of_text"]
    prompt = prompt_ids(view.tokenizer, job.prompt, end)
    ids = sampled(
        model,
        prompt,
        job.num_tokens,
        temperature=job.temperature,
        top_k=job.top_k,
        seed=job.seed,
        max_context=view.config.train.sequence_length,
    )
    print(job.prompt, end="", flush=True)
    for piece in pieces(view.tokenizer, prompt, _document(ids, end)):
        print(piece, end="", flush=True)
    print()
    return DONE


def _document(ids: Iterable[int], end: int) -> Iterator[int]:
    """The ids up to the end of the document; says so where it comes early."""
    for count, token in enumerate(ids):
        if token == end:
            print(f"\n(The document ends after {count} tokens.)", file=sys.stderr)
            return
        yield token
