"""Answers that begin at different steps are those of each alone; text ends before a stop text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from forescale.data.tokenizer import byte_tokenizer
from forescale.ground.errors import UserError
from forescale.inference.generation import (
    Answer,
    ContinuousBatch,
    GenerationConfig,
    StopTexts,
    complete,
    stream,
)
from forescale.inference.question import Question
from forescale.models import ModelConfig, Transformer
from forescale.models.decoding.sampler import Sampler

SIZES = dict(num_layers=2, width=32, num_heads=2, vocab_size=257, init_std=0.3)
CONTEXT = 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SIZES, max_sequence_length=CONTEXT)).eval()


def answer(
    tokenizer: Tokenizer, text: str, num_tokens: int, seed: int, temperature: float
) -> Answer:
    ids = tokenizer.encode(text).ids
    question = Question(text, text, ids, ids, -1, "document", CONTEXT)
    config = GenerationConfig(
        num_tokens, Sampler(temperature, repetition_penalty=1.2 + temperature)
    )
    return Answer(tokenizer, question, config, seed)


# Some leave the context, one begins beyond it, two draw, each by rules of its own.
CASES = [("abcdefg", 9, 0, 0.0), ("b", 4, 1, 0.0), ("cd" * 9, 5, 2, 0.0), ("de", 14, 3, 0.8)]
CASES += [("efghi", 3, 4, 1.1), ("f", 8, 5, 0.0), ("gh" * 5, 6, 6, 0.0)]


def alone(model, tokenizer) -> list[str]:
    answers = [answer(tokenizer, *case) for case in CASES]
    for one in answers:
        for _ in stream(model, [one]):
            pass
    return [one.text for one in answers]


def test_answers_that_join_and_leave_are_those_that_each_is_alone(model):
    tokenizer = byte_tokenizer()
    want, answers = alone(model, tokenizer), [answer(tokenizer, *case) for case in CASES]
    decoding, pieces = ContinuousBatch(model), {id(one): "" for one in answers}
    for number in range(30):
        decoding.add(
            answers[number : number + 1] if number < 4 else answers[4:] if number == 4 else []
        )
        for one, piece in decoding.step():
            pieces[id(one)] += piece
    assert not decoding.answers
    assert [one.text for one in answers] == [*pieces.values()] == want
    assert len(set(want)) == len(want)


def test_at_most_so_many_are_written_at_once_and_come_in_order(model, monkeypatch):
    tokenizer, at_once = byte_tokenizer(), []
    answers = [answer(tokenizer, *case) for case in CASES]
    step = ContinuousBatch.step
    monkeypatch.setattr(
        ContinuousBatch, "step", lambda self: [at_once.append(len(self.answers)), step(self)][1]
    )
    assert [one.text for one in complete(model, answers, 3)] == alone(model, tokenizer)
    assert max(at_once[: sum(case[1] for case in CASES) // 3]) == 3


def test_an_answer_that_nobody_waits_for_leaves(model):
    tokenizer = byte_tokenizer()
    first, second = (answer(tokenizer, *case) for case in CASES[:2])
    decoding = ContinuousBatch(model)
    decoding.add([first, second])
    decoding.step()
    first.reason = "length"
    decoding.step()
    assert decoding.answers == [second]
    assert first.num_tokens == 1


class Constant(torch.nn.Module):
    """A model with the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


def of_constant(logits: list[float], temperature: float) -> str:
    question = Question("", "", [0], [], -1, "document", 8)
    one = Answer(byte_tokenizer(), question, GenerationConfig(3, Sampler(temperature)), 0)
    return "".join(piece for _, piece in stream(Constant(logits), [one]))


def test_a_model_whose_logits_are_finite_is_sampled():
    expected = byte_tokenizer().decode([1, 1, 1])
    assert of_constant([float("-inf"), 0.0], 1.0) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_refused_with_a_sentence(temperature):
    with pytest.raises(UserError, match=r"the model: can't write text .*; use an earlier checkp"):
        of_constant([0.0, float("nan")], temperature)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By the definition: read character by character, until the text ends with a stop text."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


few = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(few, max_size=3, unique=True))
def test_it_is_cut_where_the_first_stop_text_is_complete(pieces, stops):
    stop_texts = StopTexts(stops)
    text = "".join([stop_texts.add(piece) for piece in pieces])
    assert (text + stop_texts.rest(), stop_texts.match) == cut("".join(pieces), stops)


@given(st.lists(few, max_size=8), st.lists(few, max_size=3, unique=True))
def test_no_more_is_held_back_than_may_begin_a_stop_text(pieces, stops):
    stop_texts, text, certain = StopTexts(stops), "", ""
    for piece in pieces:
        text, certain = text + piece, certain + stop_texts.add(piece)
        if stop_texts.match is not None:
            break
        pending = text.removeprefix(certain)
        assert not pending or any(stop.startswith(pending) and stop != pending for stop in stops)


@pytest.mark.parametrize("stops", [[], ["z"]])
def test_other_text_passes_at_once(stops):
    stop_texts = StopTexts(stops)
    assert [stop_texts.add(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"]
    assert stop_texts.rest() == ""
