"""The keys of `forescale generate`, which `generate` of a run in Python takes too."""

from dataclasses import dataclass
from typing import ClassVar

from forescale.config.job import ModelJob, Problems
from forescale.config.schema import key


@dataclass
class GenerateJob(ModelJob):
    """A checkpoint, prompts, and how to sample."""

    VERB: ClassVar[str] = "generate"
    FLAGS: ClassVar = {"--interactive": "interactive", "--chat": "chat"}
    PRINTS: ClassVar = {"prompt": str, "text": str, "tokens": int, "reason": str, "seed": int}
    LINES: ClassVar[str] = "one a text"

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
    # products of large matrices in 8 bits: text is written faster on a CPU, and less exactly
    int8: bool = False
    batch: int = key(16, ge=1)  # texts that are decoded together

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
