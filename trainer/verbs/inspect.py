"""`forescale inspect`: one page of what a model does while it reads a text."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from forescale.config.compose import parse
from forescale.config.job import RunJob
from forescale.config.schema import key
from forescale.config.target import TargetConfig, is_any_class
from forescale.ground.console import progress_display
from forescale.ground.document import is_json, tell
from forescale.ground.errors import DONE, UserError
from forescale.ground.storage import write_output
from forescale.inference.view import RunView, best_device, open_view

if TYPE_CHECKING:
    from forescale.inspection.blocks import Decoder


@dataclass
class InspectJob(RunJob):
    """A checkpoint, a text, and a fact in it to trace."""

    VERB: ClassVar[str] = "inspect"
    PRINTS: ClassVar = {"pieces": list[str], "loss": float, "losses": list[float | None]}

    # a run (its name or its directory), a checkpoint or a Hugging Face directory
    target: str | None = None
    step: int | None = key(None, ge=0)  # the checkpoint of this step; null: the newest
    text: str | None = None  # text that the model reads; null: the beginning of its held-out text
    tokens: int = key(64, ge=3, le=512)  # maximum number of tokens to read
    # a part of the text, such as the name in a fact: trace which states carry it to the next token
    # (causal tracing)
    subject: str | None = None
    # with subject: the expected continuation of the text; null: the model's own
    answer: str | None = None
    to: str | None = None  # the HTML file to write; null: RUN-STEP-inspect.html
    seed: int = key(1337, ge=0)  # seed of the random tokens and of the noise of a trace


JOB = InspectJob
EXAMPLES = (
    'inspect first text="def main(argument):"',
    "inspect first step=500 tokens=128 to=page.html",
    'inspect first text="import numpy as" subject=numpy',
)


def main(arguments: list[str]) -> int:
    """Write the page, or print the numbers."""
    job = parse(InspectJob, arguments)
    view = open_view(job.target or "", job.run.root)
    from forescale.data.tokenizer import text_ids
    from forescale.inspection.blocks import UnknownParts
    from forescale.inspection.reading import read, spelled, tokens_of

    _expect_decoder(view)
    checkpoint = view.checkpoint(job.step)
    ids, text = _ids(view, job)
    pieces = spelled(view.tokenizer, ids)
    subject = None if job.subject is None else tokens_of(pieces, job.subject)
    answer = None
    if job.answer is not None:
        if subject is None:
            raise UserError("answer", "is that of a trace", "give subject=TEXT too")
        if not (answer_ids := text_ids(view.tokenizer, job.answer)):
            raise UserError("answer", "is empty", "write what should follow the text")
        answer = answer_ids[0]
    model: Decoder = view.load(checkpoint).to(best_device())  # type: ignore[assignment]
    try:
        with progress_display() as progress:
            reading = read(model, ids, subject, answer, job.seed, progress)
    except UnknownParts as e:
        raise UserError(view.name, str(e), "inspect a run of another model") from e
    if is_json():  # all numbers but the maps, and no page
        tell({"pieces": pieces, **reading.as_dict()})
        return DONE
    from forescale.inspection.html import page

    step = checkpoint.position.step
    to = Path(job.to or f"{view.name}-{step}-inspect.html").expanduser()
    html = page(reading, pieces, view.tokenizer, f"{view.name}, step {step:,}", sys.argv[1:])
    write_output(to, html.encode())
    marked = sum(head.is_induction for layer in reading.layers for head in layer.heads)
    print(
        f"{to}: {len(ids) - 1} tokens of {text}, {reading.loss:.4f} nats a token, "
        f"{marked} induction head{'s' * (marked != 1)}; open it in a browser."
    )
    return DONE


def _expect_decoder(view: RunView) -> None:
    """Raise UserError unless the model is a decoder alone, of forescale or of transformers."""
    if isinstance(view.config.model, TargetConfig) and not is_any_class(view.config.model):
        problem = "its model is a class of your own, whose parts are not known here"
        raise UserError(view.name, problem, "inspect a run of a built-in model: model=tiny")
    if not view.config.continues_text:
        problem = f"was trained with objective={view.config.objective.kind}, "
        raise UserError(
            view.name, f"{problem}and is not only a decoder", "inspect a run that continues text"
        )


def _ids(view: RunView, job: InspectJob) -> tuple[list[int], str]:
    """Return what the model reads, from the token that begins a document on, and a name for it."""
    from forescale.config.sections.data import CorpusConfig
    from forescale.data.tokenizer import text_ids
    from forescale.inference.scoring import datasets_of

    most = min(job.tokens, view.config.train.sequence_length)
    begin = view.identity["dataset"]["end_of_text"]
    if job.text is not None:
        ids = text_ids(view.tokenizer, job.text)
        if len(ids) >= most:
            print(f"Note: the first {most - 1} of {len(ids):,} tokens are read.", file=sys.stderr)
        return [begin, *ids][:most], "the text"
    dataset = next(iter(datasets_of(view, CorpusConfig()).values()))
    split = dataset.split("validation")
    if not split.num_tokens:
        raise UserError("text", "is not given, and the run has no held-out text", "write text=...")
    first = split.read(0, 0, min(most - 1, split.shard_tokens[0]))
    return [begin, *first.tolist()], "held-out text"
