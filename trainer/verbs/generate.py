"""`forescale generate`: write text with a trained model, until its document or its answer ends."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from forescale.config.compose import parse
from forescale.config.job import ModelJob, Problems
from forescale.config.schema import key
from forescale.data.conversations.template import ChatTemplate, Message, Unfit
from forescale.ground.console import unchanged_output
from forescale.ground.errors import DONE, UserError
from forescale.inference.prompts import prompts_in, typed_lines, whole_input
from forescale.inference.view import RunView, open_view, ready_to_write
from forescale.run.finetune import chat_template, vocabulary_of_run

if TYPE_CHECKING:
    from torch import nn

    from forescale.inference.generation import Answer
    from forescale.inference.question import Question


@dataclass
class GenerateJob(ModelJob):
    """A checkpoint, prompts, and how to sample."""

    VERB: ClassVar[str] = "generate"
    FLAGS: ClassVar = {"--json": "json", "--interactive": "interactive", "--chat": "chat"}

    # text to continue; empty: the beginning of a document; seq2seq: text with <extra_id_0>,
    # <extra_id_1>, ... in the place of missing spans; pairs: a source; -: standard input
    prompt: str = ""
    prompts: list[str] = key([])  # several prompts, answered in this order
    # a file with a prompt on each line; .jsonl: a text, or an object with `prompt`; -: standard
    # input
    input: str | None = None
    # read prompts line by line and answer each; Ctrl-C ends an answer, Ctrl-D the command;
    # --interactive does the same
    interactive: bool = False
    # prompts are user messages in the run's chat template; with interactive, an empty line begins a
    # new conversation; --chat does the same
    chat: bool = False
    # chat template, a file in Jinja or a tokenizer_config.json; null: that of the run, else the
    # plain one of forescale finetune
    template: str | None = None
    samples: int = key(1, ge=1, le=1000)  # texts for each prompt
    num_tokens: int = key(200, ge=1)  # maximum number of new tokens
    # stop texts, at which an answer ends; \n and \t in them are a line end and a tab
    stop: list[str] = key([])
    temperature: float = key(0.8, ge=0)  # sampling temperature; 0: greedy decoding
    top_k: int | None = key(50, ge=1)  # top-k sampling: only the k most likely tokens; null: all
    # nucleus sampling (top-p): the most likely tokens up to this total probability
    top_p: float = key(1.0, gt=0, le=1)
    # minimum probability of a token, as a fraction of the largest one
    min_p: float = key(0.0, ge=0, le=1)
    # above 1: tokens of the prompt and the text become less likely
    repetition_penalty: float = key(1.0, gt=0)
    seed: int = key(1337, ge=0)  # seed of the first text; text number i has seed + i
    batch: int = key(16, ge=1)  # texts that are decoded together
    json: bool = False  # print one JSON object per text, a line each; --json does the same

    def problems(self) -> Problems:
        problems = super().problems()
        ways = {
            "prompt": bool(self.prompt),
            "prompts": bool(self.prompts),
            "input": self.input is not None,
            "interactive": self.interactive,
        }
        named = [name for name, is_given in ways.items() if is_given]
        if len(named) > 1:
            problems.append((named[1], f"excludes {named[0]}", "give one of them"))
        if self.template is not None and not self.chat:
            problems.append(("template", "writes conversations, and chat is false", "add --chat"))
        if "" in self.stop:
            problems.append(("stop", "holds an empty text", "take it out"))
        return problems


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
    return ready_to_write(view.load(view.checkpoint(job.step), job.trust))


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
    if len(answers) == 1 and not job.json:
        (answer,) = answers
        print(answer.question.echo, end="", flush=True, file=out)
        for _, piece in stream(model, answers):
            print(piece, end="", flush=True, file=out)
        print(file=out)
        if note := _note(answer):
            print(f"({note})", file=sys.stderr)
        return
    for number, answer in enumerate(complete(model, answers, job.batch), 1):
        if job.json:
            facts = {
                "prompt": answer.question.prompt,
                "text": answer.text,
                "tokens": answer.num_tokens,
                "reason": answer.reason,
                "seed": answer.seed,
            }
            print(json.dumps(facts, ensure_ascii=False), flush=True, file=out)
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
    """Answer each line of standard input; a problem with one is printed, and the next is read."""
    seed, turns = job.seed, list[Message]()
    for line in typed_lines("> "):
        if job.chat and not line:
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
