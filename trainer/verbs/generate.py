"""`forescale generate`: write text with a trained model, until its document or its answer ends."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from forescale.config.compose import compose, overrides_of
from forescale.config.job import RunJob
from forescale.config.schema import key
from forescale.console import unchanged_output
from forescale.errors import DONE, UserError
from forescale.inference.view import best_device, open_view


@dataclass
class GenerateJob(RunJob):
    """A checkpoint, a prompt, and how to sample."""

    VERB: ClassVar[str] = "generate"

    target: str | None = key(None, "a run (its name or its directory) or a checkpoint")
    step: int | None = key(None, "the checkpoint of this step; null: the newest", ge=0)
    prompt: str = key(
        "",
        "text that the model continues; empty: it begins a document; for a run of seq2seq, text "
        "with <extra_id_0>, <extra_id_1>, ... where it lacks spans; of pairs, a source, whose "
        "target it writes; -: read standard input",
    )
    num_tokens: int = key(200, "the most tokens to write", ge=1)
    temperature: float = key(0.8, "of sampling; 0 always takes the most likely token", ge=0)
    top_k: int | None = key(50, "sample among this number of most likely tokens; null: all", ge=1)
    seed: int = key(1337, "seed of the sampling", ge=0)
    trust: bool = key(False, "allow running the model class (_target_) that the run's config names")


JOB = GenerateJob
EXAMPLES = (
    'generate first prompt="def main("',
    "generate first step=500 temperature=0",
    "generate first prompt=- < start.txt",
    'generate seq2seq prompt="def <extra_id_0>(self):"',
)
_MOST = 16 << 20  # bytes of a prompt from standard input


def main(arguments: list[str]) -> int:
    """Print the prompt and the text to stdout, everything else to stderr."""
    job = compose(GenerateJob, overrides_of(GenerateJob, arguments))
    text = _standard_input() if job.prompt == "-" else job.prompt
    view = open_view(job.target or "", job.run.root)
    from forescale.inference.answering import question_of
    from forescale.inference.sampling import pieces

    question = question_of(view, text)
    model = view.load(view.checkpoint(job.step), job.trust).to(best_device())
    ids = question.answered(
        model, job.num_tokens, temperature=job.temperature, top_k=job.top_k, seed=job.seed
    )
    longest = question.most if job.num_tokens > (question.most or job.num_tokens) else None
    answer = _until(ids, question.end, question.ends, longest)
    out = unchanged_output()
    print(question.shown, end="", flush=True, file=out)
    for piece in pieces(view.tokenizer, question.before, answer, question.names):
        print(piece, end="", flush=True, file=out)
    print(file=out)
    return DONE


def _standard_input() -> str:
    """Return the text on standard input, without the line end that `echo` adds. Raises
    UserError."""
    if sys.stdin is None:
        raise UserError("prompt", "standard input is closed", "write prompt=TEXT")
    raw = sys.stdin.buffer.read(_MOST + 1)
    if len(raw) > _MOST:
        what = f"standard input has more than {_MOST:,} bytes"
        raise UserError("prompt", what, "give its last part, such as with tail -c 100000")
    try:
        return raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as e:
        what = f"standard input isn't UTF-8 (byte {e.start})"
        raise UserError("prompt", what, "convert it with iconv -t utf-8") from None


def _until(ids: Iterable[int], end: int, what: str, longest: int | None = None) -> Iterator[int]:
    """Yield the ids up to the one that ends a document or an answer, and note on stderr if it ends
    early, or has no end in the longest that the run knows."""
    for count, token in enumerate(ids):
        if token == end:
            print(f"\n(The {what} ends after {_tokens(count)}.)", file=sys.stderr)
            return
        yield token
    if longest:
        within = f"within {_tokens(longest)}, the most that it has in training"
        print(f"\n(The {what} has no end {within}.)", file=sys.stderr)


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"
