"""How a run's model reads a prompt.

A model of the next token continues the prompt, and so does one of objective=prefix, whose encoder
reads it. One of objective=seq2seq writes the spans that it lacks: sentinels are written as
T5's tokenizer has them, <extra_id_0>, <extra_id_1>, ..., in the prompt and in the answer. One of
objective=pairs reads the prompt as a source, and writes its target.
Invariant: what the model reads, and where it begins to write, are those of training, see
data/objectives/.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from forescale.config.target import is_any_class
from forescale.data.conversations.template import ChatTemplate, Message, chat_ids
from forescale.data.objectives.pairs import Pairs, separator_id, shown_separator
from forescale.data.objectives.prefix import Prefix
from forescale.data.objectives.spans import Spans
from forescale.data.tokenizer import framing, sentinel_ids, text_ids
from forescale.ground.errors import UserError
from forescale.inference.view import RunView
from forescale.models.config import ModelConfig
from forescale.run.feed import objective_of, reads_source

_SENTINEL = re.compile("<extra_id_([0-9]{1,9})>")


@dataclass(frozen=True)
class Question:
    """A prompt as a model reads it.

    prompt: its text; echo: what is printed before the answer; start: the ids after which the model
    writes; source: the ids that an encoder reads, None without one; previous: the ids before the
    answer, with which its first tokens are decoded; end: the id that ends the answer; unit: what
    that id ends, in a word; max_tokens: the most of an answer in training, None without such a
    limit; names: the texts of ids beyond the tokenizer's; other_ends: ids that end the answer too,
    such as that of a turn of a chat.
    """

    prompt: str
    echo: str
    start: list[int]
    previous: list[int]
    end: int
    unit: str
    max_context: int
    source: list[int] | None = None
    max_tokens: int | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    other_ends: Collection[int] = ()


def prompt_ids(tokenizer: Tokenizer, prompt: str, end_of_text: int) -> list[int]:
    """Return the ids of a prompt; of an empty one, the token that precedes every document."""
    return text_ids(tokenizer, prompt) or [end_of_text]


def question_of(view: RunView, text: str) -> Question:
    """Return a prompt as the model of a run reads it.

    Raises UserError if the model writes no text, or none to this prompt, or if the objective has a
    source and the model is a class of the user's own.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("prompt", "holds half a character (a lone surrogate)", "take it out")
    config, identity = view.config, view.identity["dataset"]
    end = identity["end_of_text"]
    if config.continues_text:
        ids = prompt_ids(view.tokenizer, text, end)
        # Imported weights were trained on texts that begin so.
        if view.run.is_import and (first := framing(view.tokenizer)[0]):
            ids = first + text_ids(view.tokenizer, text)
        most = config.train.sequence_length
        return Question(text, text, ids, ids, end, "document", most, other_ends=view.ends)
    if not config.objective.source_kind:
        problem = f"was trained with objective={config.objective.kind}, and continues no text"
        raise UserError(
            view.name, problem, "score it with `forescale eval`, or name a causal model"
        )
    if not (is_any_class(config.model) or isinstance(config.model, ModelConfig)):
        target = config.model.target
        problem = f"is your own class {target}, of which only you know how it reads a source"
        raise UserError("model._target_", problem, f"call forescale.open_run({view.name!r})")
    has_source = reads_source(config.model)
    objective = objective_of(config, identity["vocab_size"])
    if isinstance(objective, Prefix):
        return _of_start(view, text, objective, has_source)
    if isinstance(objective, Pairs):
        return _of_pair(view, text, objective, has_source)
    assert isinstance(objective, Spans)
    return _of_gaps(view, text, objective, has_source)


def question_of_ids(view: RunView, ids: Sequence[int]) -> Question:
    """Return token ids as the model of a run reads them, as they are. Raises UserError for ids that
    the vocabulary lacks, and for a model with a source."""
    config, identity = view.config, view.identity["dataset"]
    if not config.continues_text:
        problem = f"is a list of token ids, and a model of objective={config.objective.kind}"
        raise UserError("prompt", f"{problem} reads a source", "give it as a text")
    if most := [i for i in ids if not 0 <= i < identity["vocab_size"]]:
        problem = f"has the token id {most[0]}, and the vocabulary {identity['vocab_size']:,} ids"
        raise UserError("prompt", problem, "use the tokenizer of this model")
    text, longest = view.tokenizer.decode([*ids], skip_special_tokens=False), config.train
    end, ends, start = identity["end_of_text"], view.ends, [*ids]
    return Question(
        text, text, start, start, end, "document", longest.sequence_length, other_ends=ends
    )


def chat_question(
    view: RunView,
    template: ChatTemplate,
    messages: Sequence[Message],
    check: Callable[[str], None] = lambda text: None,
) -> Question:
    """Return a conversation as the model of a run reads it, which writes the next response. check:
    looks at its text before that is tokenised.

    Raises Unfit and UserError, as `prompt_pieces` and `question_of`.
    """
    pieces = template.prompt_pieces(messages)
    check(text := "".join(piece.text for piece in pieces))
    if not view.config.continues_text:
        return question_of(view, text)
    end = view.identity["dataset"]["end_of_text"]
    ids = chat_ids(view.tokenizer, pieces, end)
    turn = view.tokenizer.token_to_id(template.turn_end or "")
    ends, most = {*view.ends, end if turn is None else turn}, view.config.train.sequence_length
    return Question(text, text, ids, ids, end, "answer", most, other_ends=ends)


def _of_start(view: RunView, text: str, prefix: Prefix, has_encoder: bool) -> Question:
    """Return a text to continue: an encoder reads all but its last token, from which on the decoder
    writes, and of a longer one the end, as decoders do."""
    end, columns = view.identity["dataset"]["end_of_text"], prefix.columns
    ids = prompt_ids(view.tokenizer, text, end)
    if not has_encoder:
        return Question(text, text, ids, ids, end, "document", columns)
    if len(ids) < 2:  # as in training, the token before a document
        ids = [end, *ids]
    source = ids[:-1][-prefix.split :]
    most = columns - prefix.split
    return Question(text, text, ids[-1:], ids, end, "document", columns, source, most)


def _of_pair(view: RunView, text: str, pairs: Pairs, has_encoder: bool) -> Question:
    """Return a text as the source of a pair; the answer is its target, which ends as documents do.
    Raises UserError if no source of training is like it."""
    end = view.identity["dataset"]["end_of_text"]
    separator = separator_id(view.tokenizer, pairs.separator, end)
    # Imported weights may know spans; the texts of training have no special tokens.
    sentinels = sentinel_ids(view.tokenizer) if view.run.is_import else []
    source = _ids_with(sentinels, view.tokenizer, text)
    if not source:
        raise UserError("prompt", "is empty, and no source of training is", "give a text")
    if pairs.framed:
        before, behind = framing(view.tokenizer)
        source = [*before, *source, *behind]
    _check_length(source, pairs.split)
    if separator in source:
        problem = (
            f"holds the separator {shown_separator(pairs.separator)}, with which a source ends"
        )
        raise UserError("prompt", problem, "take it out")
    start = (_declared_start(view) if view.run.is_import else []) or [separator]
    return Question(
        prompt=text,
        echo="",
        start=start if has_encoder else [*source, separator],
        previous=[separator],
        end=end,
        unit="answer",
        max_context=pairs.columns,
        source=source if has_encoder else None,
        max_tokens=pairs.columns - pairs.split,
        names=_names(sentinels),
        other_ends=view.ends,
    )


def _ids_with(sentinels: Sequence[int], tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in which <extra_id_0> stands for the first of these, and so on."""
    ids = list[int]()
    # Text and numbers of sentinels take turns.
    for i, part in enumerate(_SENTINEL.split(text) if sentinels else [text]):
        if i % 2 and int(part) < len(sentinels):
            ids.append(sentinels[int(part)])
        else:
            ids += text_ids(tokenizer, f"<extra_id_{part}>" if i % 2 else part)
    return ids


def _names(sentinels: Sequence[int]) -> dict[int, str]:
    return {token: f"<extra_id_{i}>" for i, token in enumerate(sentinels)}


def _declared_start(view: RunView) -> list[int]:
    """Return the ids with which an answer of imported weights begins, as their files declare."""
    files = view.run.read_imported()
    config = files.get("config.json", {}) | files.get("generation_config.json", {})
    ids = [config.get("decoder_start_token_id"), config.get("forced_bos_token_id")]
    size = view.identity["dataset"]["vocab_size"]
    start, *forced = [i if type(i) is int and 0 <= i < size else None for i in ids]
    return [] if start is None else [start, *(i for i in forced if i is not None)]


def _check_length(source: list[int], most: int) -> None:
    """Raise UserError if a source is longer than in training."""
    if len(source) > most:
        problem = f"has {len(source):,} tokens, and in training a source has {most:,}"
        raise UserError("prompt", problem, "give less text")


def _of_gaps(view: RunView, text: str, spans: Spans, has_encoder: bool) -> Question:
    """Return a text that lacks spans, where it has sentinels; the answer ends with the sentinel
    after those. Raises UserError if it has others than in training, or is longer."""
    numbers = [int(n) for n in _SENTINEL.findall(text)]
    for i, n in enumerate(numbers):
        if n != i:
            problem = f"has <extra_id_{n}> where the next one is <extra_id_{i}>"
            raise UserError("prompt", problem, "number them from 0 on, in order")
    if not numbers:
        problem = "has no <extra_id_0>, the place of a span that the model fills in"
        raise UserError("prompt", problem, "write it into the text")
    if len(numbers) > (most := spans.most_spans):
        problem = f"has {len(numbers):,} spans to fill in, and in training a text has {most:,}"
        raise UserError("prompt", problem, "give fewer")
    source = _ids_with(spans.sentinels, view.tokenizer, text)
    start, end = spans.around or (spans.sentinels[0], spans.sentinels[len(numbers)])
    source += [end] if spans.around else []
    _check_length(source, spans.split)
    names = _names(spans.sentinels)
    return Question(
        prompt=text,
        echo=names.get(start, ""),
        start=[start] if has_encoder else [*source, start],
        previous=source,
        end=end,
        unit="answer",
        max_context=spans.columns,
        source=source if has_encoder else None,
        max_tokens=int(spans.num_targets(np.array(spans.window_length + 1))),
        names=names,
    )
