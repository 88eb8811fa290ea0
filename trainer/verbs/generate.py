"""`forescale generate`: a trained model writes, token by token, until its document ends."""

import sys
from collections.abc import Iterable, Iterator

from forescale.cli import overrides_of
from forescale.config.compose import compose
from forescale.errors import DONE
from forescale.inference.view import open_view
from forescale.verbs.jobs import GenerateJob


def main(words: list[str]) -> int:
    """The text goes to stdout, prompt first; everything else to stderr."""
    job: GenerateJob = compose("generate", overrides_of("generate", words))
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
