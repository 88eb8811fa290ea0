"""`forescale generate`: write text with a trained model, until its document or its answer ends."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from forescale.config.compose import parse
from forescale.config.generate import GenerateJob
from forescale.data.conversations.template import ChatTemplate, Message, Unfit
from forescale.ground.console import unchanged_output
from forescale.ground.document import is_json, tell_line
from forescale.ground.errors import DONE, UserError
from forescale.inference.prompts import prompts_in, typed_lines, whole_input
from forescale.inference.view import RunView, open_view, ready_to_write
from forescale.run.finetune import chat_template, vocabulary_of_run

if TYPE_CHECKING:
    from torch import nn

    from forescale.inference.generation import Answer
    from forescale.inference.question import Question


_HELP = """\
/clear   begin a new conversation; an empty line does the same
/quit    end; Ctrl-D does the same
Ctrl-C ends an answer alone. All other lines are answered."""

JOB = GenerateJob
EXAMPLES = (
    'generate first prompt="def main("',
    "generate first step=500 temperature=0",
    "generate first prompt=- < start.txt",
    'generate first \'prompts=["import ", "class "]\' samples=2 top_p=0.9',
    'generate first input=prompts.txt \'stop=["def ", "class "]\' --json',
    "generate first --interactive",
    "generate chat --chat --interactive",
    'generate seq2seq prompt="def <extra_id_0>(self):"',
)


def main(arguments: list[str]) -> int:
    """Print prompts and texts to stdout, everything else to stderr."""
    job = parse(GenerateJob, arguments)
    view = open_view(job.target or "", job.run.root)
    template = None
    if job.chat:
        template = chat_template(view.run, vocabulary_of_run(view.run), job.template)
        template.check()
    if job.interactive:
        _converse(job, view, template, _model(job, view))
        return DONE
    prompts = job.prompts or [whole_input() if job.prompt == "-" else job.prompt]
    prompts = prompts if job.input is None else prompts_in(job.input)
    answers = _answers(job, view, template, prompts)
    _print(job, _model(job, view), answers)
    return DONE


def _model(job: GenerateJob, view: RunView) -> "nn.Module":
    if sys.stderr.isatty():
        print(f"Loading {view.name} ...", file=sys.stderr, flush=True)
    return ready_to_write(view.load(view.checkpoint(job.step), job.trust), job.int8)


def _answers(
    job: GenerateJob,
    view: RunView,
    template: ChatTemplate | None,
    prompts: list[str],
    before: Sequence[Message] = (),
) -> list["Answer"]:
    """Return the answers, all empty. template: of a chat; before: its turns until now.
    Raises UserError for a prompt that the model can't read."""
    from forescale.inference.generation import Answer, GenerationConfig, Sampler
    from forescale.inference.question import chat_question, question_of

    sampler = Sampler(job.temperature, job.top_k, job.top_p, job.min_p, job.repetition_penalty)
    stops = [text.replace("\\n", "\n").replace("\\t", "\t") for text in job.stop]
    config = GenerationConfig(job.num_tokens, sampler, tuple(stops))
    answers: list[Answer] = []

    def ask(prompt: str) -> "Question":
        if template is None:
            return question_of(view, prompt)
        try:
            messages = [*before, {"role": "user", "content": prompt}]
            question = chat_question(view, template, messages)
        except Unfit as e:
            raise UserError("prompt", f"is a message {e}", "write another one") from None
        return replace(question, prompt=prompt, echo="")

    for number, prompt in enumerate(prompts, 1):
        try:
            question = ask(prompt)
        except UserError as e:
            if len(prompts) == 1 or e.where != "prompt":
                raise
            raise UserError(f"prompt {number} of {len(prompts)}", e.problem, e.todo) from None
        for _ in range(job.samples):
            answers.append(Answer(view.tokenizer, question, config, job.seed + len(answers)))
    return answers


def _print(job: GenerateJob, model: "nn.Module", answers: list["Answer"]) -> None:
    """Print one text as it comes; of several, each under a line that says which it is; or JSON."""
    from forescale.inference.generation import complete, stream

    out = unchanged_output()
    if len(answers) == 1 and not is_json():
        (answer,) = answers
        print(answer.question.echo, end="", flush=True, file=out)
        for _, piece in stream(model, answers):
            print(piece, end="", flush=True, file=out)
        print(file=out)
        if note := _note(answer):
            print(f"({note})", file=sys.stderr)
        return
    for number, answer in enumerate(complete(model, answers, job.batch), 1):
        if is_json():
            facts = {
                "prompt": answer.question.prompt,
                "text": answer.text,
                "tokens": answer.num_tokens,
                "reason": answer.reason,
                "seed": answer.seed,
            }
            tell_line(facts)
            continue
        print(f"--- {number} of {len(answers)}, seed {answer.seed}", file=out)
        print(answer.question.echo + answer.text, flush=True, file=out)


def _note(answer: "Answer") -> str:
    """Return why an answer is shorter than num_tokens, as a sentence, or an empty text."""
    n, unit = answer.num_tokens, answer.question.unit
    count = f"{n:,} token{'s' * (n != 1)}"
    if answer.reason == "end":
        return f"The {unit} ends after {count}."
    if answer.reason == "stop":
        return f"A stop text ends it after {count}."
    if n < answer.config.num_tokens:
        return f"The {unit} has no end within {count}, the most that it has in training."
    return ""


def _converse(
    job: GenerateJob, view: RunView, template: ChatTemplate | None, model: "nn.Module"
) -> None:
    """Answer each line of standard input; a problem with one is printed, and the next is read. A
    person's may be a command; to a program's lines, of a pipe, nothing is added."""
    seed, turns = job.seed, list[Message]()
    is_person = sys.stdin is not None and sys.stdin.isatty()
    if is_person:
        count = sum(weight.numel() for weight in model.parameters())
        print(f"{view.name}, {count:,} parameters. /help shows the commands.", file=sys.stderr)
    for line in typed_lines("> "):
        if is_person and line.strip() == "/quit":
            return
        if is_person and line.strip() == "/help":
            print(_HELP, file=sys.stderr)
            continue
        if (job.chat and not line) or (is_person and line.strip() == "/clear"):
            turns = []
            continue
        try:
            answers = _answers(replace(job, seed=seed), view, template, [line], turns)
            _print(job, model, answers)
            messages = ("user", line), ("assistant", answers[0].text)
            turns += [{"role": role, "content": text} for role, text in messages if job.chat]
        except KeyboardInterrupt:
            print(file=unchanged_output())
        except UserError as e:
            print(f"forescale: {e}", file=sys.stderr)
        seed += job.samples
