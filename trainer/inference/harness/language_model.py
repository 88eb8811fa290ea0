"""A run's model in the interface of lm_eval: likelihoods of texts, and answers to prompts.

Invariant: results equal those of lm_eval's HFLM on the exported model: the same rule makes ids of
texts, rows that are too long are cut on the left, and decoding is greedy unless a task samples.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, hash_string, make_disjoint_window
from tokenizers import Tokenizer
from torch import Tensor, nn

from forescale.data.conversations.template import ChatTemplate, Unfit
from forescale.data.tokenizer import load_tokenizer
from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.inference.generation import Answer, GenerationConfig, complete
from forescale.inference.question import Question
from forescale.inference.view import RunView, best_device
from forescale.models.decoding.sampler import Sampler
from forescale.models.transformer import Transformer
from forescale.run.finetune import chat_template, vocabulary_of_run

_MAX_TOKENS = 256  # of an answer, unless a task says otherwise: lm_eval's default
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_READ = (*_SAMPLING, "do_sample", "until", "max_gen_toks")

Row = tuple[int, ...]


class LanguageModel(TemplateLM):
    """A run's model as `lm_eval.simple_evaluate(model=...)` takes one.

    model: of the run, with weights; batch: rows of a forward pass; length: the most tokens that it
    reads, None: as in training. title: what progress calls the work. cut_rows, cut_tokens: by task,
    the number of rows that were cut since `restart`, and of the tokens that they lost.
    Raises UserError for a model that continues no text.
    """

    def __init__(
        self,
        view: RunView,
        model: nn.Module,
        *,
        batch: int = 8,
        length: int | None = None,
        progress: Progress = silent,
    ):
        super().__init__()
        config = view.config
        if not config.continues_text:
            problem = f"was trained with objective={config.objective.kind}, and continues no text"
            raise UserError("tasks", problem, "leave it out, or name a run that continues text")
        self._view = view
        self._device = best_device()
        self._model = model.to(self._device)
        self._spelling = load_tokenizer(view.run.verified_tokenizer())
        self._prefix, self._end = special_ids(view, self._spelling)
        # An imported model was trained with the tokens that its tokenizer puts before a text.
        self._frames = view.run.imported.is_file()
        self.max_length = length or config.train.sequence_length
        self.batch, self._progress = batch, progress
        self.title = ""
        self._lost: list[int] = []  # tokens cut from each row of the last call; below 1: none
        self.restart()

    def restart(self) -> None:
        """Count cut rows anew."""
        self.cut_rows, self.cut_tokens = Counter[str](), Counter[str]()

    @property
    def eot_token_id(self) -> int:
        return self._end

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def batch_size(self) -> int:
        return self.batch

    @property
    def tokenizer_name(self) -> str:
        """The key of lm_eval's cache of questions."""
        return f"{self._view.name}-{hash_string(self._template.source)[:12]}"

    @cached_property
    def _template(self) -> ChatTemplate:
        return chat_template(self._view.run, vocabulary_of_run(self._view.run), None)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the source of the run's chat template, or of the plain one."""
        return self._template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the text after which the model writes its next response. Raises
        UserError for one that the template can't write."""
        if not add_generation_prompt:
            problem = "begins the response itself (gen_prefix), which isn't done in chats"
            raise UserError(self.title or "tasks", problem, "ask without chat")
        try:
            return self._template.prompt(chat_history)
        except Unfit as e:
            raise UserError(self.title or "tasks", f"has a question {e}", "ask without chat") from e

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text. As HFLM does, the name of a special token is that token, and
        what the tokenizer puts before a text isn't put there twice."""
        if add_special_tokens is None:
            begun = string.startswith(self._text_of(self._prefix))
            add_special_tokens = self._frames and not begun
        return self._spelling.encode(string, add_special_tokens=add_special_tokens).ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the nats of the continuation's probability, at
        most 0, and whether greedy decoding writes it."""
        for request in requests:
            if not request.args[1]:
                raise self._without_tokens(*request.args)
        results = super().loglikelihood(requests, disable_tqdm=True)
        for request, lost in zip(requests, self._lost, strict=True):
            self._count_cut(request, lost)
        return results

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        self._lost = [len(a) + len(b) - self.max_length - 1 for _, a, b in requests]
        rows: dict[Row, list[int]] = {}  # the requests that share a row
        for i, (pair, context, continuation) in enumerate(requests):
            if not continuation:
                raise self._without_tokens(*pair)
            if len(continuation) > self.max_length:
                problem = (
                    f"an answer has {len(continuation):,} tokens, and the model reads at most "
                )
                todo = "leave the task out, or name a model that reads more"
                raise UserError(self.title or "tasks", f"{problem}{self.max_length:,}", todo)
            cut = (context + continuation)[-(self.max_length + 1) :][:-1]  # on the left
            rows.setdefault(tuple(cut), []).append(i)
        results = [(0.0, False)] * len(requests)
        order, done = sorted(rows, key=lambda row: (-len(row), row)), 0
        for first in range(0, len(order), self.batch):
            part = order[first : first + self.batch]
            counts = [max(len(requests[i][2]) for i in rows[row]) for row in part]
            for row, tail in zip(part, self._tails(part, counts), strict=True):
                for i in rows[row]:
                    pair, continuation = requests[i][0], requests[i][2]
                    target = torch.tensor(continuation, device=tail.device)
                    chances = tail[-len(continuation) :]
                    nats = float(chances.gather(-1, target[:, None]).sum())
                    results[i] = (nats, bool((chances.argmax(-1) == target).all()))
                    if pair is not None:
                        self.cache_hook.add_partial("loglikelihood", pair, results[i])
                done += len(rows[row])
            self._progress(f"{self.title} likelihoods", done, len(requests), "texts")
        return results

    def _count_cut(self, request: Instance, tokens: int) -> None:
        if tokens > 0:
            task = request.task_name or ""
            self.cut_rows[task] += 1
            self.cut_tokens[task] += tokens

    @torch.no_grad()
    def _tails(self, rows: Sequence[Row], counts: Sequence[int]) -> Iterator[Tensor]:
        """Yield log-probabilities of what follows the last tokens of each row, (count, V) fp32.
        The first row is the longest."""
        width = len(rows[0])
        first = min(len(row) - count for row, count in zip(rows, counts, strict=True))
        # Padding behind a row changes nothing before it: the model is causal.
        padded = [[*row, *[0] * (width - len(row))] for row in rows]
        tokens = torch.tensor(padded, device=self._device)
        options = {"last": width - first} if isinstance(self._model, Transformer) else {}
        logits = self._model(tokens, **options)[:, first - width :]
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            end = len(row) - first
            yield logits[i, end - count : end].float().log_softmax(-1)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the nats of the probability of each text, read in windows of max_length, so that
        each token is predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._prefix,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(piece)) for piece in pieces]
            windows += parts
            counts.append(len(parts))
        nats = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(nats)[0] for _ in range(count)) for count in counts]
        for request, one in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, one)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the continuation of each prompt, up to a stop text, the end of the document or the
        maximum of tokens."""
        answers = [self._answer(i, request) for i, request in enumerate(requests)]
        # The longest first: a lack of memory shows at once.
        order = sorted(answers, key=lambda answer: -len(answer.question.start))
        for done, _ in enumerate(complete(self._model, order, self.batch), 1):
            self._progress(f"{self.title} answers", done, len(answers), "texts")
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return [answer.text for answer in answers]

    def _answer(self, number: int, request: Instance) -> Answer:
        """Return the empty answer to a request. Raises UserError for an unsupported option."""
        prompt, kwargs = request.args
        options = normalize_gen_kwargs(dict(kwargs), _MAX_TOKENS)
        most = options["max_gen_toks"]
        if other := [key for key in options if key not in _READ and options[key] not in (None, 1)]:
            problem = f"its generation_kwargs hold {', '.join(other)}, and this model reads only "
            raise UserError(self.title or "tasks", problem + ", ".join(_READ), "take it out")
        if most >= self.max_length:
            problem = f"wants answers of {most:,} tokens, and the model reads {self.max_length:,}"
            todo = "set max_gen_toks to less in generation_kwargs of its file"
            raise UserError(self.title or "tasks", problem, todo)
        ids = self.tok_encode(prompt) or [self._prefix]
        self._count_cut(request, len(ids) + most - self.max_length)
        ids = ids[-(self.max_length - most) :]
        # Decoded without the prompt, as HFLM does: a first space may be lost with SentencePiece.
        ends, most_read = self._view.ends, self.max_length  # of several, generate of HFLM too
        question = Question(prompt, "", ids, [], self._end, "document", most_read, other_ends=ends)
        stops = tuple(text for text in [*options["until"], self._text_of(self._end)] if text)
        config = GenerationConfig(most, _sampler(options), stops)
        return Answer(self._spelling, question, config, seed=number)

    def _text_of(self, token: int) -> str:
        return self._spelling.decode([token], skip_special_tokens=False)

    def _without_tokens(self, context: str, continuation: str) -> UserError:
        problem = f"its answer {continuation!r} has no token of its own after {context[-20:]!r}"
        return UserError(self.title or "tasks", problem, 'set target_delimiter in its file to " "')


def special_ids(view: RunView, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids that begin and end a document: those of training, or, of imported weights,
    the first one that the files with them name."""
    end = view.identity["dataset"]["end_of_text"]
    files = view.run.read_imported() if view.run.imported.is_file() else {}
    names = ("tokenizer_config.json", "special_tokens_map.json")
    token = next((t for name in names if (t := files.get(name, {}).get("bos_token"))), None)
    token = token.get("content") if isinstance(token, Mapping) else token
    first = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return end if first is None else first, end


def _sampler(options: Mapping[str, Any]) -> Sampler:
    """Return the sampler of generation_kwargs. Raises UserError for a number that leaves no token,
    and for do_sample without a temperature, which HFLM refuses too."""
    sampling = {key: options[key] for key in _SAMPLING if options.get(key) is not None}
    if options.get("do_sample") and not sampling.get("temperature"):
        problem = "do_sample is true, without a temperature above 0"
        todo = "set temperature in the task's file, such as temperature: 1.0, or take do_sample out"
        raise UserError("generation_kwargs", problem, todo)
    try:
        return Sampler(**{"temperature": 0.0, **sampling})
    except ValueError as e:
        problem = str(e).partition(";")[0].rstrip(".")
        raise UserError("generation_kwargs", problem, "change it in the task's file") from None
